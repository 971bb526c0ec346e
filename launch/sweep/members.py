"""The runs of a sweep of any kind: those that a launcher wrote down, that lie there, and that are still to come."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import HydraException

from regrow.checkpoint.files import read_regular
from regrow.launch.config.errors import UserError
from regrow.launch.config.overrides import parse_overrides
from regrow.launch.sweep.slurm_jobs import Job
from regrow.launch.sweep.status import RunStatus, Sweep, SweepRun, inspect_run
from regrow.trainer.report.read import read_config, read_overrides
from regrow.trainer.report.swept import override_pairs, swept_fields
from regrow.trainer.run_folders import run_folders

__all__ = ["find_runs_of_sweep", "runs_of_command", "sorted_statuses", "statuses_in"]

# Hydra writes a sweep's command here before its runs start.
_MULTIRUN = "multirun.yaml"
_LIMIT_BYTES = 16 << 20
# Of a grid; what would be more is not listed before it is there.
_MOST = 10_000
# Where more is better; of anything else, less is.
_HIGHER = ("acc", "tokens_per_s", "mfu", "exact", "f1", "bleu", "rouge", "step", "tokens")


def find_runs_of_sweep(folder: Path, sweep: Sweep | None) -> list[SweepRun]:
    """All runs of a sweep, those of `sweep.json` first.

    Args:
        folder: the sweep's (`run.root`).
        sweep: its `sweep.json`; None where no launcher wrote one.

    Raises:
        UserError: nothing there is of a sweep.
    """
    known = list(sweep.runs.values()) if sweep is not None else []
    listed = {Path(run.run_dir).resolve() for run in known}
    found = [_as_sweep_run(f, folder) for f in run_folders(folder) if f.resolve() not in listed]
    if not known:
        found += _to_come(folder, found)
    if not known and not found:
        raise UserError(
            f"DIR must be a sweep's directory, but {folder} has neither runs nor a sweep.json; give the "
            "sweep's run.root"
        )
    return [*known, *found]


def _as_sweep_run(run_dir: Path, folder: Path) -> SweepRun:
    config = read_config(run_dir)
    train, checkpoint = config.get("train"), config.get("checkpoint")
    steps = train.get("steps") if isinstance(train, Mapping) else None
    place = checkpoint.get("folder") if isinstance(checkpoint, Mapping) else None
    return SweepRun(
        name=str(run_dir.relative_to(folder)),
        run_dir=str(run_dir),
        arguments=read_overrides(run_dir),
        steps=steps if isinstance(steps, int) else 0,
        checkpoint_folder=str(place or "checkpoint"),
        ranks=[1],
        gpu=False,
        cpus=1,
        launcher="here",
        resources={},
        working_dir="",
    )


def _to_come(folder: Path, there: Sequence[SweepRun]) -> list[SweepRun]:
    """What the sweep's last command asks for and nobody has begun."""
    begun = [override_pairs(run.arguments) for run in there]
    same, points = _grid(folder)
    steps = override_pairs(same).get("train.steps", "")
    missing = []
    for point in points:
        if not any(override_pairs(point).items() <= own.items() for own in begun):
            run = _as_sweep_run(folder / ",".join(point), folder)
            run.arguments, run.steps = [*same, *point], int(steps) if steps.isdecimal() else 0
            missing.append(run)
    return missing


def _grid(folder: Path) -> tuple[list[str], list[tuple[str, ...]]]:
    """The overrides of the folder's last command: those of all runs, and the swept ones of each; of a grid alone."""
    try:
        written: Any = yaml.safe_load(read_regular(folder / _MULTIRUN, _LIMIT_BYTES))
        overrides = parse_overrides([str(o) for o in written["hydra"]["overrides"]["task"]])
        swept = [o for o in overrides if o.is_sweep_override()]
        axes = [[f"{o.get_key_element()}={text}" for text in o.sweep_string_iterator()] for o in swept]
    except (OSError, yaml.YAMLError, ValueError, KeyError, TypeError, HydraException):
        # Not there, not Hydra's, or of a sweeper that chooses its points itself.
        return [], []
    same = [str(o.input_line) for o in overrides if not o.is_sweep_override()]
    return same, list(islice(product(*axes), _MOST)) if axes else []


def runs_of_command(folder: Path) -> list[Path]:
    """The directories of the runs that the folder's last command swept over; every run where that is not a grid."""
    points = [override_pairs(point) for point in _grid(folder)[1]]
    folders = run_folders(folder)
    if not points:
        return folders
    found = []
    for run_dir in folders:
        own = override_pairs(read_overrides(run_dir))
        if any(point.items() <= own.items() for point in points):
            found.append(run_dir)
    return found


def statuses_in(runs: Sequence[SweepRun], queue: Mapping[str, Job] | None) -> list[RunStatus]:
    """What each run has come to, with the fields that tell it from the others.

    Args:
        runs: of one sweep.
        queue: Slurm's; None where there is none.
    """
    places = [Path(run.run_dir) for run in runs]
    told = [(read_config(p), read_overrides(p) or run.arguments) for p, run in zip(places, runs, strict=True)]
    fields = swept_fields(told)
    return [
        replace(inspect_run(run, queue), fields={name: values[n] for name, values in fields.items()})
        for n, run in enumerate(runs)
    ]


def _is_better_low(name: str) -> bool:
    """Whether less of a measure is better."""
    return not any(word in name for word in _HIGHER)


def sorted_statuses(statuses: Sequence[RunStatus], by: str | None) -> list[RunStatus]:
    """The best first; those that have no such value come last, in the order in which they were given.

    Args:
        statuses: of a sweep.
        by: a measure, a swept field, or a column; None takes `val_loss`, and `loss` where no run has that.

    Raises:
        UserError: no run has it.
    """
    name = by or next((n for n in ("val_loss", "loss") if any(n in s.last for s in statuses)), "loss")
    values = [_value(status, name) for status in statuses]
    if by is not None and all(v is None for v in values):
        known = sorted({*(n for s in statuses for n in (*s.last, *s.fields)), "step"})
        raise UserError(
            f"--sort must be a measure or a swept field that a run has, but is {by}; use one of {', '.join(known)}"
        )
    low = _is_better_low(name) or any(name in s.fields for s in statuses)

    def place(n: int) -> tuple[bool, bool, float, str]:
        value = values[n]
        number = float(value) if isinstance(value, int | float) else 0.0
        return value is None, isinstance(value, str), number if low else -number, str(value)

    return [statuses[n] for n in sorted(range(len(statuses)), key=place)]


def _value(status: RunStatus, name: str) -> Any:
    if name in status.last:
        return status.last[name]
    if name in status.fields:
        return status.fields[name]
    with suppress(AttributeError):
        value = getattr(status, name)
        return value if isinstance(value, int | float | str) else None
    return None
