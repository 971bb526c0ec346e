"""`regrow.runs`: the runs below a folder, and what each has come to. No torch."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regrow.checkpoint.errors import CheckpointError, DamagedStepError
from regrow.checkpoint.policy.lineage import is_visible
from regrow.checkpoint.run.catalog import Catalog
from regrow.checkpoint.run.lease import Liveness, life_of, newest_lease, this_process
from regrow.checkpoint.storage.base import Storage
from regrow.checkpoint.storage.opening import open_storage
from regrow.launch.run.stored_run import stored_config, stored_steps
from regrow.trainer.run_files import METRICS, RECORD
from regrow.trainer.run_record import RunRecord, RunRecordError

__all__ = ["Run", "is_run", "run_folders", "runs"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A run, at the moment it was looked at.

    Attributes:
        name: its path below the folder that was asked for.
        path: its directory, as `load_model` and `read_metrics` take it.
        status: `running`, `finished`, `stopped` (saved and resumable), `failed`, `killed` (resumable from `step`),
            `not started`, `unknown` (on another host, or ended without a word there), or `damaged`, where its
            `run.json` or `config.yaml` cannot be read.
        step: the newest complete checkpoint; None while there is none.
        steps: `train.steps` of its last start; None where its config cannot be read.
    """

    name: str
    path: Path
    status: str
    step: int | None
    steps: int | None

    @property
    def config(self) -> dict[str, Any]:
        """The config that it was accepted with, as plain values: `run.config["optimizer"]["lr"]`.

        Raises:
            ValueError: it cannot be read.
        """
        return stored_config(self.path)


def runs(root: str | Path = "outputs") -> list[Run]:
    """The runs in a folder and in the folders below it, by name; a run that is in a sweep too.

    Args:
        root: `run.root` of the commands; or a run.

    Raises:
        ValueError: there is no such folder.
    """
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"{folder} must be a folder with runs in it, but is none; check the path")
    found = [folder] if is_run(folder) else run_folders(folder)
    return [_look_at(path, path.name if path == folder else str(path.relative_to(folder))) for path in found]


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's directory."""
    return (folder / RECORD).is_file() or (folder / METRICS).is_file()


def run_folders(root: Path) -> list[Path]:
    """The directories of the runs below a folder, by name. Nothing is looked for inside a run."""
    return sorted(_below(root))


def _below(folder: Path) -> Iterator[Path]:
    try:
        with os.scandir(folder) as entries:
            below = [Path(e.path) for e in entries if e.is_dir(follow_symlinks=False) and not e.name.startswith(".")]
    except PermissionError:
        return
    for path in below:
        if is_run(path):
            yield path
        else:
            yield from _below(path)


def _look_at(path: Path, name: str) -> Run:
    try:
        record, config = RunRecord.load(path), stored_config(path)
    except (RunRecordError, CheckpointError):
        return Run(name=name, path=path, status="damaged", step=None, steps=None)
    steps = config.get("train", {}).get("steps")
    place = stored_steps(path, config)
    if record is None:
        return Run(name=name, path=path, status="damaged", step=None, steps=steps)
    step = max((a.saved_step for a in record.attempts), default=0) or None
    if not place.is_remote:
        step = _newest_step(place, record)
    # A run that saves nothing keeps its lease in its own directory.
    lease = place if config["checkpoint"].get("enable", True) else open_storage(path)
    return Run(name=name, path=path, status=_status(record, lease), step=step, steps=steps)


def _newest_step(place: Storage, record: RunRecord) -> int | None:
    catalog = Catalog(place)
    for step in reversed(catalog.candidates()):
        try:
            entry = catalog.open(step)
        except (DamagedStepError, CheckpointError):
            continue
        if is_visible(record.lineages, step, entry.manifest.lineage):
            return step
    return None


def _status(record: RunRecord, place: Storage) -> str:
    life = _life(place)
    if life is Liveness.alive:
        return "running"
    if not record.attempts:
        return "not started"
    end = record.attempts[-1].end
    if end is None:
        return "unknown" if life is Liveness.unknown else "killed"
    return end if end in ("finished", "failed") else "stopped"


def _life(place: Storage) -> Liveness:
    """Of whoever holds the run. Steps on an object store are not asked: a listing of runs waits for no network."""
    if place.is_remote:
        return Liveness.unknown
    try:
        _, holder = newest_lease(place)
    except OSError:
        return Liveness.unknown
    return Liveness.dead if holder is None else life_of(holder, this_process())
