"""`regrow-eval`: what the model of any checkpoint makes of tasks."""

import argparse
from importlib import import_module
from pathlib import Path

from regrow.errors import ConfigError
from regrow.launch.commands.ending import end_with
from regrow.launch.commands.model_options import add_model_options
from regrow.launch.commands.watch_run import watch
from regrow.launch.exit_code import ExitCode
from regrow.trainer.evaluation.harness import READERS
from regrow.trainer.evaluation.task import find_tasks

__all__ = ["main"]

_WORK = "regrow.launch.commands.evaluate_model"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="regrow-eval", description=__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CHECKPOINT", help="a run (its newest step), a step, a Hugging Face folder")
    add("--tasks", nargs="+", required=True, metavar="FILE", help="tasks (.jsonl), or folders of them")
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
    for name, least, remedy in (("few_shot", 0, "0"), ("batch_size", 1, "16"), ("context", 1, "256")):
        value = getattr(args, name)
        if value is not None and value < least:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} must be at least {least}, but is {value}; use {remedy}")
    if args.watch and len(args.checkpoints) > 1:
        raise ConfigError(f"--watch must be given one run, but was given {len(args.checkpoints)}; start one for each")
    tasks = find_tasks(args.tasks, READERS)
    # torch takes seconds to import, and what is refused here does without; so does keeping a run's steps.
    if args.watch:
        run_dir = Path(args.checkpoints[0]).expanduser()
        watch(run_dir, lambda: import_module(_WORK).step_evaluator(run_dir, args, tasks))
    else:
        import_module(_WORK).run(args, tasks)
    return ExitCode.done


if __name__ == "__main__":
    main()
