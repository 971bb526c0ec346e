"""`regrow.runs`: the runs below a folder, and what each has come to. No torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regrow.checkpoint.errors import CheckpointError, DamagedStepError
from regrow.checkpoint.policy.lineage import is_visible
from regrow.checkpoint.run.catalog import Catalog
from regrow.checkpoint.storage.base import Storage
from regrow.checkpoint.storage.opening import open_storage
from regrow.launch.run.stored_run import stored_config, stored_steps
from regrow.trainer.run_folders import is_run, run_folders, run_status
from regrow.trainer.run_record import RunRecord, RunRecordError

__all__ = ["Run", "runs"]


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
    return Run(name=name, path=path, status=run_status(record, lease), step=step, steps=steps)


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
