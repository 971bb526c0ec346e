"""Finding runs below a folder, and what each has come to by its record and its lease. No torch."""

import os
from collections.abc import Iterator
from pathlib import Path

from regrow.checkpoint.run.lease import Liveness, life_of, newest_lease, this_process
from regrow.checkpoint.storage.base import Storage
from regrow.trainer.run_files import METRICS, RECORD
from regrow.trainer.run_record import RunRecord

__all__ = ["is_run", "run_folders", "run_status"]


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


def run_status(record: RunRecord, lease: Storage) -> str:
    """What a run has come to.

    Args:
        record: its own.
        lease: where its lease lies: with its steps, or in its directory where it saves none.

    Returns:
        `running`, `finished`, `stopped`, `failed`, `killed`, `not started`, or `unknown`, where that cannot be told
        from here.
    """
    life = _life(lease)
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
