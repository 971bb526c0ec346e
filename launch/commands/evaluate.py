"""`regrow-eval`: what the model of any checkpoint makes of tasks."""

import argparse
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from regrow.errors import ConfigError
from regrow.launch.commands.ending import end_with
from regrow.launch.commands.model_options import add_model_options
from regrow.launch.commands.watch_run import watch
from regrow.launch.exit_code import ExitCode
from regrow.trainer.evaluation.harness import READERS
from regrow.trainer.evaluation.task import Task, find_tasks

if TYPE_CHECKING:
    from regrow.launch.commands.command_ranks import CommandRanks

__all__ = ["main"]

_WORK = "regrow.launch.commands.evaluate_model"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="regrow-eval", description=__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CHECKPOINT", help="a run (its newest step), a step, a Hugging Face folder")
    add("--tasks", nargs="+", default=[], metavar="FILE", help="tasks (.jsonl, .yaml), or folders of them")
    add("--harness", nargs="+", default=[], metavar="NAME", help="tasks of lm_eval by name, run by it; extra `eval`")
    add("--harness-tasks", metavar="DIR", help="a folder with further tasks of lm_eval")
    add("--limit", type=int, metavar="N", help="items of each of lm_eval's tasks; all")
    add("--few-shot", type=int, default=0, metavar="N", help="examples before each item, chosen by --seed; 0")
    add("--seed", type=int, default=0, help="of their choice; 0")
    add("--context", type=int, metavar="N", help="tokens that are looked back at most; what the model takes")
    add("--batch-size", type=int, default=16, metavar="N", help="rows together; 16")
    add_model_options(parser)
    add("--watch", action="store_true", help="follow one run: each step that it commits, a line of JSON each")
    add("--json", action="store_true", help="print one JSON value: metrics by task, of several checkpoints by theirs")
    return parser


def main() -> None:
    """The command's entry; exit code 2 for bad input."""
    args = _parser().parse_args()
    end_with(lambda: _run(args), as_json=args.json)


def _run(args: argparse.Namespace) -> ExitCode:
    for name, least, remedy in (
        ("few_shot", 0, "0"), ("batch_size", 1, "16"), ("context", 1, "256"), ("limit", 1, "100"),
    ):  # fmt: skip
        value = getattr(args, name)
        if value is not None and value < least:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} must be at least {least}, but is {value}; use {remedy}")
    if args.watch and len(args.checkpoints) > 1:
        raise ConfigError(f"--watch must be given one run, but was given {len(args.checkpoints)}; start one for each")
    if not args.tasks and not args.harness:
        raise ConfigError("--tasks must name files of tasks, but is not given; see docs/evaluate.md")
    if args.harness:
        return _run_harness(args)
    tasks = find_tasks(args.tasks, READERS)
    # torch takes seconds to import, and what is refused here does without; so does keeping a run's steps.
    if args.watch and args.tp == 1 and args.ranks in (None, 1):
        _watch(args, tasks)
        return ExitCode.done
    code: ExitCode = import_module("regrow.launch.commands.command_ranks").on_ranks(
        args, "regrow.launch.commands.evaluate", lambda ranks: _work(args, tasks, ranks)
    )
    return code


def _work(args: argparse.Namespace, tasks: Sequence[Task], ranks: "CommandRanks") -> None:
    if args.watch:
        _watch(args, tasks, ranks)
    else:
        import_module(_WORK).run(args, tasks, ranks)


def _watch(args: argparse.Namespace, tasks: Sequence[Task], *ranks: "CommandRanks") -> None:
    """Follows a run; of several ranks the first one does, and tells the others of each step."""
    run_dir = Path(args.checkpoints[0]).expanduser()
    if ranks and not ranks[0].speaks:
        import_module(_WORK).follow(run_dir, args, tasks, *ranks)
        return
    try:
        watch(run_dir, lambda: import_module(_WORK).step_evaluator(run_dir, args, tasks, *ranks))
    finally:
        if ranks:
            ranks[0].told(lambda: None)


def _run_harness(args: argparse.Namespace) -> ExitCode:
    if args.tp > 1 or args.ranks not in (None, 1):
        raise ConfigError("--harness must be given without --tp and --ranks, but is given with them; leave them out")
    for option in ("tasks", "watch"):
        if getattr(args, option):
            raise ConfigError(f"--harness must be given without --{option}, but is given with it; leave one out")
    if find_spec("lm_eval") is None:
        raise ConfigError("--harness must find lm_eval, but it is not installed; pip install 'regrow[eval]'")
    import_module("regrow.launch.commands.harness_model").run(args)
    return ExitCode.done


if __name__ == "__main__":
    main()
