"""What every rank of a run is told, and how its ranks ended. No torch: the command needs both before it."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regrow.checkpoint.documents import DocumentError, read_document
from regrow.checkpoint.files import read_regular, write_json
from regrow.checkpoint.run.lease import FencingToken
from regrow.launch.config.plugins import UserPackages, active_packages
from regrow.launch.config.schema import Config
from regrow.launch.exit_code import ExitCode
from regrow.trainer.parallel.layout import Layout
from regrow.trainer.run_record import RunRecord

__all__ = ["OUTCOME", "Outcome", "RankSpec", "read_outcome", "write_outcome"]

log = logging.getLogger(__name__)

OUTCOME = "stop.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class RankSpec:
    """What every rank of a run is told.

    Attributes:
        packages: the user's own. First, because a rank has them from there on, and what follows may be of their
            classes.
        config: typed.
        config_dict: the same as plain values, as the run stores them.
        config_hash: of identity and hyperparameters, as the run's manifests hold it.
        layout: the degrees.
        device_type: `cpu` or `cuda`.
        run_dir: the run's directory.
        data_folders: the token stores by their sources' names; one source has the empty name.
        validation_folders: the token stores of `data.validation_sets`.
        sweep: the sweep's name, if any.
        overrides: the command line.
        given_ranks: torchrun or srun has started the ranks, this process being one of them.
        record: the run's, as this start makes it; None until the run is opened.
        ticket: of the lease that the launcher holds for this run.
    """

    packages: UserPackages = field(default_factory=active_packages)
    config: Config
    config_dict: dict[str, Any]
    config_hash: str
    layout: Layout
    device_type: str
    run_dir: Path
    data_folders: dict[str, Path]
    validation_folders: dict[str, Path] = field(default_factory=dict)
    sweep: str | None
    overrides: list[str] = field(default_factory=list)
    given_ranks: bool = False
    record: RunRecord | None = None
    ticket: FencingToken | None = None


_CODES = {
    "finished": ExitCode.done,
    "refused": ExitCode.bad_input,
    "terminated": ExitCode.resumable,
    "preempted": ExitCode.resumable,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a run's ranks ended; the stop record.

    Attributes:
        kind: `finished`, `terminated`, `preempted`, `refused` (the state cannot be loaded as asked; nothing was
            changed) or `failed`.
        step: reached.
        message: of the failure.
    """

    kind: str
    step: int
    message: str = ""

    @property
    def exit_code(self) -> ExitCode:
        """What the command ends with."""
        return _CODES.get(self.kind, ExitCode.failed)


def read_outcome(run_dir: Path) -> Outcome | None:
    """The stop record, None where the ranks left none that can be read."""
    try:
        return read_document(read_regular(run_dir / OUTCOME), Outcome)
    except (DocumentError, OSError):
        return None


def write_outcome(run_dir: Path, outcome: Outcome) -> None:
    """Writes the stop record; the run's end is what it is where that fails."""
    try:
        write_json(run_dir / OUTCOME, {"kind": outcome.kind, "step": outcome.step, "message": outcome.message})
    except OSError as error:
        log.warning("%s cannot be written (%s)", run_dir / OUTCOME, error.strerror or error)
