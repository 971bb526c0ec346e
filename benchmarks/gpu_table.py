"""The results of `benchmarks.gpu` as a table of Markdown, and into a page."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["BEGIN", "END", "put_into", "table"]

BEGIN, END = "<!-- benchmarks.gpu: begin -->", "<!-- benchmarks.gpu: end -->"
_COLUMNS = ("tokens/s", "MFU, 6N", "MFU, 6N + 12LdT", "peak memory", "first step")


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Every part's line: what it found, or why it found nothing.

    Args:
        results: by part, as `--json` wrote them.
    """
    limits = results.get("limits", {})
    lines = [
        f"{limits.get('device', 'device unknown')}, torch {limits.get('torch', 'unknown')}. {_limits(limits)}",
        "",
        f"| part | {' | '.join(_COLUMNS)} |",
        "|---" * (len(_COLUMNS) + 1) + "|",
    ]
    lines += [_row(name, result) for name, result in results.items() if name not in ("limits", "tests")]
    lines += ["", f"`tests/gpu`: {_outcome(results.get('tests', {}), 'summary')}."]
    for name in ("1b", "save_async"):
        lines += _save(name, results.get(name, {}))
    profile = results.get("1b", {}).get("profile")
    if profile:
        shares = ", ".join(f"{kind} {share:.0%}" for kind, share in profile["shares"].items())
        lines += ["", f"A step of `1b` by kind of kernel ({profile['busy_ms']} ms): {shares}."]
    return "\n".join(lines)


def put_into(page: Path, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Replaces what a page has between its two markers.

    Raises:
        ValueError: the page has none.
    """
    text = page.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} must hold the lines {BEGIN} and {END}, but does not; add them")
    page.write_text(f"{before}{BEGIN}\n\n{table(results)}\n\n{END}{after}")


def _limits(limits: Mapping[str, Any]) -> str:
    names = {
        "bf16_tflops": "bf16 product, TFLOP/s",
        "fp8_tflops": "fp8 product, TFLOP/s",
        "copy_tb_per_s": "copy, TB/s",
        "to_pinned_gib_per_s": "to pinned memory, GiB/s",
        "from_pinned_gib_per_s": "from it",
    }
    found = [f"{words}: {limits[name]}" for name, words in names.items() if name in limits]
    return f"Limits: {'; '.join(found)}." if found else f"Limits: {_outcome(limits, '')}."


def _row(name: str, result: Mapping[str, Any]) -> str:
    if "tokens_per_s" not in result:
        inner = {k: v for k, v in result.items() if isinstance(v, Mapping) and "tokens_per_s" in v}
        rows = [_row(f"{name}, {k}", v) for k, v in inner.items()]
        if "failed" in result or "not_run" in result or not rows:
            rows.append(f"| {name} | {_outcome(result, '')} |" + " |" * (len(_COLUMNS) - 1))
        return "\n".join(rows)
    more = f", {result['layers']} layers" if "layers" in result else ""
    cells = [
        f"{result['tokens_per_s']:,}",
        _percent(result.get("mfu_6n")),
        _percent(result.get("mfu_6n_12ldt")),
        f"{result['memory_gib']} GiB" if result.get("memory_gib") is not None else "",
        f"{result['first_step_s']} s",
    ]
    failed = f" ({_outcome(result, '')})" if "failed" in result else ""
    return f"| {name}{more}{failed} | {' | '.join(cells)} |"


def _percent(value: float | None) -> str:
    return "unknown peak" if value is None else f"{value:.1%}"


def _outcome(result: Mapping[str, Any], key: str) -> str:
    """What was found under `key`, else why it was not."""
    if "failed" in result:
        # A table has one line for each row, and cells end at a bar.
        return "failed: " + " ".join(str(result["failed"]).replace("|", "/").split())[:300]
    if "not_run" in result:
        return f"not run: {result['not_run']}"
    return str(result.get(key, "no result"))


def _save(name: str, result: Mapping[str, Any]) -> list[str]:
    save = result.get("save")
    if not save:
        return ["", f"Saves of `{name}`: {_outcome(result, 'save')}."]
    calls, durable = (", ".join(f"{v:g}" for v in save[key]) for key in ("calls_ms", "durable_s"))
    copies = save["copies"]
    rates = (
        copies
        if isinstance(copies, str)
        else ", ".join(f"{c['pinned_gib']} GiB at {c['gib_per_s']} GiB/s" for c in copies)
    )
    lines = [
        "",
        f"Saves of `{name}`: the calls took {calls} ms; durable after {durable} s; training lost "
        f"{save['lost_s_first']} s after the first and {save['lost_s_second']} s after the second (steps of "
        f"{save['usual_step_s']} s); copies to pinned memory: {rates}.",
    ]
    lines += [f"Start: {result['start']}."] if "start" in result else []
    lines += [f"Restart with its load: {result['restart']['start']}."] if "restart" in result else []
    return lines
