"""Continuing a run whose record is gone, from what its newest step says of it.

A run's directory may be lost while its steps are not: they lie on an object store, or somebody copied them alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from regrow.checkpoint.format.stored_step import StoredStep
from regrow.checkpoint.policy.lineage import Lineage, StartKind
from regrow.launch.config.errors import UserError
from regrow.launch.config.identity import config_hash
from regrow.launch.config.later_fields import later_defaults
from regrow.launch.config.schema import Config
from regrow.trainer.run_record import RunRecord

__all__ = ["check_owner", "newest_of", "rebuild_record"]


def newest_of(complete: Sequence[StoredStep]) -> StoredStep:
    """The newest step of the newest lineage, of at least one step."""
    return max(complete, key=lambda e: (len(e.manifest.lineages), e.step))


def rebuild_record(
    complete: Sequence[StoredStep], config: Config, config_dict: Mapping[str, Any], fingerprint: str, folder: str
) -> RunRecord | None:
    """The record of the run that the steps are of; None where there are none.

    Args:
        complete: the steps, ascending.
        config: the command's.
        config_dict: the same as plain values.
        fingerprint: of the command's data.
        folder: of the steps, for messages.

    Raises:
        UserError: the steps are not of the run that the command describes, as far as they tell.
    """
    if not complete:
        return None
    newest = newest_of(complete).manifest
    if newest.run_id and newest.lineages:
        return RunRecord(
            run_id=newest.run_id, lineages=list(newest.lineages), data_fingerprint=newest.data_fingerprint
        )
    same_config = newest.config_hash == config_hash(config_dict, later_defaults(config))
    if not same_config or newest.data_fingerprint != fingerprint:
        what = "config" if newest.data_fingerprint == fingerprint else "data"
        raise UserError(
            f"run.name must not name a run whose record is gone and whose steps are of another {what}, but {folder} "
            f"holds step {newest.step} and there is no run.json; restore it, or choose another run.name"
        )
    return RunRecord(lineages=_line_of(complete), data_fingerprint=fingerprint)


def _line_of(complete: Sequence[StoredStep]) -> list[Lineage]:
    """The lineages of steps of one line: each continues the newest step of the one before it."""
    lineages: list[Lineage] = []
    before: StoredStep | None = None
    for entry in complete:
        if before is None or before.manifest.lineage != entry.manifest.lineage:
            parent = before.manifest.lineage if before is not None else None
            origin = StartKind.fresh if before is None else StartKind.step
            step = before.step if before is not None else 0
            lineages.append(Lineage(id=entry.manifest.lineage, origin=origin, origin_step=step, parent=parent))
            if len({x.id for x in lineages}) < len(lineages):
                raise UserError(
                    f"{entry.url} must continue the steps before it where run.json is gone, but is of another "
                    "line of steps; move it away, or restore run.json"
                )
        before = entry
    return lineages


def check_owner(record: RunRecord, complete: Sequence[StoredStep], run_dir: object, folder: str) -> None:
    """Refuses steps of another run: two directories with one name share a place for checkpoints.

    Raises:
        UserError: a step is of another run.
    """
    other = next((e for e in complete if e.manifest.run_id and e.manifest.run_id != record.run_id), None)
    if other is not None:
        raise UserError(
            f"checkpoint.folder must hold the steps of one run, but {folder} holds step {other.step} of the run "
            f"{other.manifest.run_id}, and {run_dir} is the run {record.run_id}; choose another run.name, or another "
            "checkpoint.folder"
        )
