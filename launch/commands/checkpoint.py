"""`regrow-ckpt`: looks after checkpoints without starting a run, and converts them."""

import argparse
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

from regrow.checkpoint.convert.average import shares_of
from regrow.checkpoint.inspect.compare import compare
from regrow.checkpoint.inspect.maintenance import Row, list_steps, pin, prune, repair, show, tree, unpin, verify
from regrow.checkpoint.scratch import clear_dead_scratch
from regrow.checkpoint.storage.opening import as_storage
from regrow.launch.commands.convert import (
    ConversionRequest,
    add_conversions,
    average_checkpoints,
    buffers_beside,
    export_checkpoint,
    import_checkpoint,
    under_our_names,
)
from regrow.launch.commands.ending import end_with
from regrow.launch.run.logs import log_to_console
from regrow.launch.run.stored_run import steps_place
from regrow.trainer.bars import showing
from regrow.trainer.wording import size_text

__all__ = ["main"]

log = logging.getLogger(__name__)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="regrow-ckpt", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.add_argument("--json", action="store_true", help="print one JSON value")
        return made

    ls = command("ls", "a run's steps: age, size, layout, state")
    ls.add_argument("run", help="a run, or its checkpoint folder; a path or URL")
    shown = command("show", "what a checkpoint holds")
    shown.add_argument("checkpoint", help="a step, a run (its newest step), a Hugging Face folder, or a file")
    shown.add_argument("--tree", action="store_true", help="sums by module")
    verified = command("verify", "read every byte and compare it with its hash; exit code 0 only when all is sound")
    verified.add_argument("place", help="a run or a step; a path or URL")
    differ = command("diff", "which tensors differ, and by how much; across formats; exit code 1 when any does")
    differ.add_argument("a")
    differ.add_argument("b")
    pruned = command("prune", "remove steps but the newest; pinned ones and steps being read stay")
    pruned.add_argument("run")
    pruned.add_argument("--keep-latest", type=int, required=True, metavar="K", help="so many of the newest stay")
    pruned.add_argument("--keep-every", type=int, metavar="N", help="every N-th step stays")
    pruned.add_argument("--dry-run", action="store_true", help="only say what would go")
    for name, text in (("pin", "keep a step for good"), ("unpin", "let retention have a step again")):
        made = command(name, text)
        made.add_argument("step", help="a step's folder; a path or URL")
    mended = command("repair", "remove what killed saves left, set damaged steps aside")
    mended.add_argument("run")
    add_conversions(command)
    return parser


def main() -> None:
    """The command's entry. Exit codes: 0 done, 1 damage or a difference found, 2 bad input."""
    args = _parser().parse_args()
    log_to_console()
    end_with(lambda: _COMMANDS[args.command](args), as_json=args.json)


def _print(args: argparse.Namespace, value: Any, lines: list[str]) -> None:
    if args.json:
        print(json.dumps(value))
    elif lines:
        print("\n".join(lines))


def _table(rows: list[Mapping[str, str]]) -> list[str]:
    """Columns as wide as their widest cell."""
    if not rows:
        return []
    head = {name: name for name in rows[0]}
    widths = {name: max(len(r[name]) for r in [head, *rows]) for name in head}
    return ["  ".join(r[n].ljust(widths[n]) for n in head).rstrip() for r in [head, *rows]]


def _age_text(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for limit, unit, size in ((120, "s", 1), (7200, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86_400:.0f} d"


def _ls(args: argparse.Namespace) -> int:
    rows = list_steps(steps_place(as_storage(args.run)))

    def cells(row: Row) -> dict[str, str]:
        marks = [m for m, on in (("best", row.best), ("pinned", row.pinned)) if on]
        state = row.state if not row.problem else f"{row.state}: {row.problem}"
        return {
            "step": row.name,
            "age": _age_text(row.age_s),
            "size": size_text(row.nbytes),
            "kind": row.kind or "-",
            "layout": " ".join(f"{k}={v}" for k, v in row.layout.items() if v != 1) or "one rank",
            "marks": " ".join(marks) or "-",
            "state": state,
        }

    _print(args, [r.as_json() for r in rows], _table([cells(r) for r in rows]) or ["no steps"])
    return 0


def _show(args: argparse.Namespace) -> int:
    found = show(args.checkpoint)
    lines = [f"{name}: {value}" for name, value in found["about"].items()]
    if args.tree:
        lines += tree(found["tensors"])
    else:
        lines += _table(
            [
                {
                    "tensor": t["name"],
                    "dtype": t["dtype"],
                    "shape": " × ".join(map(str, t["shape"])) or "scalar",
                    "size": size_text(t["bytes"]),
                    "shards": str(t["shards"]),
                }
                for t in found["tensors"]
            ]
        )
    _print(args, found, lines)
    return 0


def _verify(args: argparse.Namespace) -> int:
    with showing("verifying", quiet=args.json) as bar:
        place = steps_place(as_storage(args.place))
        reports = verify(place) if bar is None else verify(place, progress=bar.update)
    lines = [
        f"{r['place']}: {'sound' if not r['problems'] else '; '.join(r['problems'])} "
        f"({r['tensors']} tensors, {size_text(r['bytes'])})"
        for r in reports
    ]
    _print(args, reports, lines)
    return 1 if any(r["problems"] for r in reports) else 0


def _diff(args: argparse.Namespace) -> int:
    with under_our_names(args.a) as a, under_our_names(args.b) as b:
        # Hugging Face has parameters alone.
        skip = buffers_beside(args.a) | buffers_beside(args.b) if args.a != args.b else set()
        difference = compare(a, b, skip=skip)
    _print(args, difference.as_json(), difference.lines() or ["no difference"])
    return 1 if difference.lines() else 0


def _prune(args: argparse.Namespace) -> int:
    removed = prune(steps_place(as_storage(args.run)), args.keep_latest, args.keep_every, dry_run=args.dry_run)
    word = "would remove" if args.dry_run else "removed"
    _print(args, {"removed": removed}, [f"{word} step {s}" for s in removed] or ["nothing to remove"])
    return 0


def _pin(args: argparse.Namespace) -> int:
    pin(as_storage(args.step))
    _print(args, {"pinned": args.step}, [f"pinned {args.step}"])
    return 0


def _unpin(args: argparse.Namespace) -> int:
    unpin(as_storage(args.step))
    _print(args, {"unpinned": args.step}, [f"unpinned {args.step}"])
    return 0


def _repair(args: argparse.Namespace) -> int:
    done = repair(steps_place(as_storage(args.run))) + clear_dead_scratch()
    _print(args, {"done": done}, done or ["nothing to repair"])
    return 0


def _export(args: argparse.Namespace) -> int:
    return _converted(args, export_checkpoint(ConversionRequest.from_arguments(args)))


def _import(args: argparse.Namespace) -> int:
    return _converted(args, import_checkpoint(ConversionRequest.from_arguments(args)))


def _average(args: argparse.Namespace) -> int:
    shares = shares_of(len(args.checkpoints), args.weights, args.decay)
    args.checkpoint = args.checkpoints[0]
    return _converted(args, average_checkpoints(args.checkpoints, shares, ConversionRequest.from_arguments(args)))


def _converted(args: argparse.Namespace, result: Any) -> int:
    value = {
        "out": str(result.out),
        "tensors": result.tensors,
        "bytes": result.nbytes,
        "resumed_tensors": result.resumed,
    }
    again = f", {result.resumed} of them from an earlier try" if result.resumed else ""
    _print(
        args, value, [f"wrote {result.out}: {result.tensors} tensors{again}, {size_text(result.nbytes)}, verified"]
    )
    return 0


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "ls": _ls,
    "show": _show,
    "verify": _verify,
    "diff": _diff,
    "prune": _prune,
    "pin": _pin,
    "unpin": _unpin,
    "repair": _repair,
    "export": _export,
    "import": _import,
    "average": _average,
}


if __name__ == "__main__":
    main()
