"""What one GPU does, within a time budget: the tests that need it, the machine's limits, training, saving.

    python -m benchmarks.gpu --budget 330 --json FILE [--only part,…] [--tiny]

Each part is a process of its own with a bound of its own; its result is kept whatever a later one does, and what does
not fit into the budget is listed as not run. `--tiny` runs every part with tiny sizes on whatever device there is.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

REPO = Path(__file__).resolve().parent.parent
_TINY_MODEL = ["model.dim=32", "model.n_layers=2", "model.n_heads=4", "model.n_kv_heads=2", "model.ffn_dim=64"]


class PartFailedError(RuntimeError):
    """A part's command failed or took too long; the message is the end of what it printed."""


@dataclass(kw_only=True, slots=True)
class Bench:
    """What the parts share.

    Attributes:
        tiny: tiny sizes.
        folder: for runs and corpora.
        deadline: on the monotonic clock.
    """

    tiny: bool
    folder: Path
    deadline: float
    logs: dict[str, str] = field(default_factory=dict)

    def command(self, name: str, arguments: Sequence[str], bound_s: float) -> str:
        """Runs a Python command; returns what it printed.

        Raises:
            PartFailedError: it failed, or ran past its bound or the budget.
        """
        environ = {**os.environ, "PYTHONPATH": f"{REPO / 'src'}:{os.environ.get('PYTHONPATH', '')}"}
        limit = max(1.0, min(bound_s, self.deadline - time.monotonic()))
        try:
            done = subprocess.run(
                [sys.executable, *arguments],
                cwd=self.folder,
                env=environ,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=limit,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            out = (error.stdout or b"").decode(errors="replace")
            self.logs[name] = out
            raise PartFailedError(f"not done after {limit:.0f} s: …{out[-1500:]}") from error
        self.logs[name] = done.stdout
        if done.returncode:
            raise PartFailedError(f"exit code {done.returncode}: …{done.stdout[-3000:]}")
        return done.stdout

    def train(self, name: str, overrides: Sequence[str], bound_s: float) -> list[dict[str, Any]]:
        """Trains a run; returns its rows."""
        corpus = self.folder / "text.jsonl"
        if not corpus.exists():
            write_corpus(corpus, documents=600 if self.tiny else 6000)
        size = ["model=llama3_debug", *_TINY_MODEL, "model.vocab_size=320"] if self.tiny else []
        self.command(
            name,
            [
                "-P", "-m", "regrow.launch.train", *overrides, *size, "data=text", f"data.files=[{corpus}]",
                "data.tokenizer_vocab_size=300", "hooks=none", "run.root=runs", f"run.name={name}",
                "train.log_every=1",
            ],
            bound_s,
        )  # fmt: skip
        rows = (self.folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(row) for row in rows]


def write_corpus(path: Path, documents: int) -> None:
    """Text of random words, the same each time."""
    import random

    rng = random.Random(7)
    words = ["".join(rng.choices("abcdefghijklmnoprstuvw", k=rng.randint(2, 7))) for _ in range(400)]
    with path.open("w") as out:
        for _ in range(documents):
            out.write(json.dumps({"text": " ".join(rng.choices(words, k=rng.randint(20, 400)))}) + "\n")


def speed(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Medians over the second half of a run, in which nothing is compiled any more."""
    steady = rows[len(rows) // 2 :]
    mfu = [r["mfu"] for r in steady]
    return {
        "tokens_per_s": statistics.median(r["tokens_per_s"] for r in steady),
        "step_time_s": statistics.median(r["step_time_s"] for r in steady),
        "mfu_6n_12ldt": None if mfu[0] is None else statistics.median(mfu),
        "memory_gib": rows[-1]["memory_gib"],
        "first_step_s": rows[0]["step_time_s"],
    }


def tests(bench: Bench) -> dict[str, Any]:
    """tests/gpu."""
    out = bench.command("tests", ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(REPO / "tests/gpu")], 150)
    return {"summary": out.strip().splitlines()[-1]}


def limits(bench: Bench) -> dict[str, Any]:
    """The card's rates for a bf16 product, a copy on it, and copies from it to pinned memory."""
    if not torch.cuda.is_available():
        return {"device": "cpu"}
    n = 512 if bench.tiny else 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product_s = _seconds(lambda: a @ b)
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_s = _seconds(lambda: target.copy_(source))
    pinned = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    to_host_s = _seconds(lambda: pinned.copy_(source, non_blocking=True))
    return {
        "device": torch.cuda.get_device_name(),
        "torch": str(torch.__version__),
        "bf16_tflops": 2 * n**3 / product_s / 1e12,
        "copy_tb_per_s": 2 * source.numel() / copy_s / 1e12,
        "to_pinned_gib_per_s": 1 / to_host_s,
    }


def _seconds(work: Callable[[], object]) -> float:
    """The median of ten timed calls."""
    times = []
    for _ in range(13):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return float(statistics.median(times[3:]))


_SIZE_1B = ["model=llama3_1b", "precision=bf16", "checkpoint=disabled"]


def train_1b_compiled(bench: Bench) -> dict[str, Any]:
    """1B at 2,048 tokens, compiled."""
    sizes = _batch(bench, 2048, 8)
    return speed(bench.train("1b-compiled", [*_SIZE_1B, *sizes, "train.compile=true", "train.steps=16"], 120))


def train_1b(bench: Bench) -> dict[str, Any]:
    """1B at 2,048 tokens, eager."""
    return speed(bench.train("1b", [*_SIZE_1B, *_batch(bench, 2048, 8), "train.steps=10"], 60))


def train_1b_documents(bench: Bench) -> dict[str, Any]:
    """1B at 8,192 tokens, without and with attention that stays within documents, eager."""
    found = {}
    for masked in (False, True):
        name = f"1b-8k-{'documents' if masked else 'whole'}"
        more = [f"data.document_mask={str(masked).lower()}", "train.steps=8"]
        found[name] = speed(bench.train(name, [*_SIZE_1B, *_batch(bench, 8192, 2), *more], 60))
    return found


def _batch(bench: Bench, seq_len: int, rows: int) -> list[str]:
    if bench.tiny:
        seq_len, rows = 32, 2
    return [f"data.seq_len={seq_len}", f"data.micro_batch_size={rows}", f"data.global_batch_size={rows}"]


def save_pinned(bench: Bench) -> dict[str, Any]:
    """A save beside training, `async_with_pinned_mem`: the call, the time that training lost, and a resume."""
    return _save(bench, "pinned")


def save_async(bench: Bench) -> dict[str, Any]:
    """A save beside training, `async`."""
    return _save(bench, "async")


def _save(bench: Bench, policy: str) -> dict[str, Any]:
    """Trains past two saves; the second is made in warm memory."""
    name = f"save-{policy}"
    interval, steps = (4, 10) if bench.tiny else (30, 75)
    arguments = [
        "model=llama3_1b", "precision=bf16", f"checkpoint={policy}", f"checkpoint.interval={interval}",
        "checkpoint.keep_latest_k=2", "checkpoint.last_save_model_only=true", *_batch(bench, 2048, 8),
        f"train.steps={steps}", f"scheduler.total_steps={2 * steps}",
    ]  # fmt: skip
    rows = bench.train(name, arguments, 150)
    out = bench.logs[name]
    usual = statistics.median(r["step_time_s"] for r in rows[interval // 3 : interval])
    second = rows[2 * interval :]
    result: dict[str, Any] = {
        "usual_step_s": usual,
        "calls_ms": [float(ms) for ms in re.findall(r"saving step \d+ \(.*\): ([\d.]+) ms", out)],
        "durable_s": [float(s) for s in re.findall(r"durable after ([\d.]+) s", out)],
        # Meanwhile the snapshots' memory is made.
        "first_step_s": rows[0]["step_time_s"],
        "lost_s_before": sum(max(0.0, r["step_time_s"] - usual) for r in rows[1:interval]),
        "lost_s_first": sum(max(0.0, r["step_time_s"] - usual) for r in rows[interval : 2 * interval]),
        "lost_s_second": sum(max(0.0, r["step_time_s"] - usual) for r in second),
        "slowest_step_s_second": max(r["step_time_s"] for r in second),
        "memory_gib": rows[-1]["memory_gib"],
        "start": re.findall(r"first step .*", out)[-1:],
    }
    return result


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "limits": limits,
    "tests": tests,
    "1b_compiled": train_1b_compiled,
    "save_pinned": save_pinned,
    "1b": train_1b,
    "1b_documents": train_1b_documents,
    "save_async": save_async,
}


def main() -> int:
    """Runs the parts; 0 when each that was run succeeded."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=float(os.environ.get("BUDGET_S", "330")))
    parser.add_argument("--only", default=os.environ.get("ONLY", ""), help="parts, with commas between")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--logs", type=Path, help="a folder for what the parts print")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    wanted = arguments.only.split(",") if arguments.only else list(PARTS)
    unknown = sorted(set(wanted) - set(PARTS))
    if unknown:
        parser.error(f"--only must name parts out of {', '.join(PARTS)}, but names {', '.join(unknown)}")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="regrow-gpu-") as folder:
        bench = Bench(tiny=arguments.tiny, folder=Path(folder), deadline=time.monotonic() + arguments.budget)
        for name in wanted:
            results[name] = _run(name, bench)
            print(f"{name}: {json.dumps(results[name])}", flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1))
        if arguments.logs:
            arguments.logs.mkdir(parents=True, exist_ok=True)
            (arguments.logs / "gpu.log").write_text("\n".join(f"== {n}\n{t}" for n, t in bench.logs.items()))
    return int(any("failed" in r for r in results.values()))


def _run(name: str, bench: Bench) -> dict[str, Any]:
    left = bench.deadline - time.monotonic()
    if left < 5:
        return {"not_run": "the budget is used up"}
    started = time.monotonic()
    try:
        found = PARTS[name](bench)
    except Exception as error:  # the next part is run whatever happened in this one
        found = {"failed": f"{type(error).__name__}: {error}"}
    return {**found, "part_s": round(time.monotonic() - started, 1)}


if __name__ == "__main__":
    sys.exit(main())
