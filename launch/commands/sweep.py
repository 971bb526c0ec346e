"""`regrow-sweep`: looks after a sweep, whichever launcher started it."""

import argparse
import json
import logging
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from regrow.launch.commands.ending import end_with
from regrow.launch.config.errors import UserError
from regrow.launch.run.logs import log_to_console
from regrow.launch.run.versions import own_version
from regrow.launch.sweep.local import run_here
from regrow.launch.sweep.members import find_runs_of_sweep, sorted_statuses, statuses_in
from regrow.launch.sweep.slurm import submit_runs
from regrow.launch.sweep.slurm_jobs import Job, cancel, list_jobs
from regrow.launch.sweep.status import RunStatus, Sweep, SweepRun, inspect_run
from regrow.launch.sweep.table import status_table

__all__ = ["main"]

_ENDED = ("finished",)


def main() -> None:
    """The command's entry; exit code 2 for bad input."""
    arguments = _parser().parse_args()
    log_to_console()
    logging.getLogger().setLevel(logging.WARNING if arguments.json else logging.INFO)
    end_with(lambda: _run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="regrow-sweep", description=__doc__)
    parser.add_argument("--version", action="version", version=f"regrow {own_version()}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        (
            "status",
            "a table: state, swept fields, step, losses, attempts, node, time lost between starts, checkpoints",
        ),
        ("resubmit", "submit again what is neither finished nor queued"),
        ("cancel", "have the running ones save, then cancel what is queued; nothing comes back by itself"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("folder", type=Path, help="the sweep's directory (run.root)")
        command.add_argument("--json", action="store_true", help="machine-readable")
        if name == "status":
            command.add_argument("--sort", metavar="NAME", help="by a measure or a swept field, the best first")
            command.add_argument("--best", action="store_true", help="the best run alone, by --sort or its result")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    folder: Path = arguments.folder.absolute()
    sweep = Sweep.load(folder)
    if arguments.command == "status":
        _show(_chosen(find_runs_of_sweep(folder, sweep), arguments), arguments)
        return 0
    if sweep is None:
        raise UserError(
            f"DIR must be the directory of a sweep that a launcher started, but {folder} has no sweep.json; give the "
            "sweep's run.root, or the sweep's command again"
        )
    names = _resubmit(sweep) if arguments.command == "resubmit" else _cancel(sweep)
    if arguments.json:
        print(json.dumps(names))
    else:
        done = "resubmitted" if arguments.command == "resubmit" else "cancelled"
        print(f"{done}: {', '.join(names) or 'none'}")
    return 0


def _chosen(runs: Sequence[SweepRun], arguments: argparse.Namespace) -> list[RunStatus]:
    """What is to be shown, in its order.

    Raises:
        UserError: no run has what they are to be sorted by, or none has a result.
    """
    statuses = statuses_in(runs, _queue(runs))
    if not arguments.best:
        return statuses if arguments.sort is None else sorted_statuses(statuses, arguments.sort)
    begun = [s for s in sorted_statuses(statuses, arguments.sort) if s.last]
    if not begun:
        raise UserError("--best must be asked of a sweep with results, but no run has one yet; leave --best out")
    return begun[:1]


def _queue(runs: Iterable[SweepRun]) -> dict[str, Job] | None:
    wanted = any(run.jobs for run in runs)
    return list_jobs() if wanted and shutil.which("squeue") else None


def _show(statuses: Sequence[RunStatus], arguments: argparse.Namespace) -> None:
    if arguments.json:
        print(json.dumps([asdict(s) for s in statuses], indent=1))
        return
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(status_table(statuses, arguments.sort))


def _resubmit(sweep: Sweep) -> list[str]:
    queue = _queue(sweep.runs.values())
    unfinished = [run for run in sweep.runs.values() if inspect_run(run, queue).state not in _ENDED]
    # What acts each time that it is given has acted already.
    again = ["run.resume=auto", "run.rewind=false"]
    slurm = [r for r in unfinished if r.launcher == "slurm"]
    for run in slurm:
        run.arguments = [*(a for a in run.arguments if a not in again), *again]
    names: list[str] = []
    if slurm:
        names += submit_runs(sweep.folder, slurm)
    local = [r for r in unfinished if r.launcher == "local"]
    if local:
        codes = run_here(sweep.folder, local)
        names += [run.name for run, code in zip(local, codes, strict=True) if code is not None]
    return names


def _cancel(sweep: Sweep) -> list[str]:
    queue = _queue(sweep.runs.values()) or {}
    own: dict[str, SweepRun] = {i: run for run in sweep.runs.values() for i in run.jobs if i in queue}
    cancel(list(own))
    return [run.name for run in own.values()]


if __name__ == "__main__":
    main()
