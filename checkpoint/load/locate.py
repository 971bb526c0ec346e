"""Which checkpoint a path means: a step, the newest step of a run, or a folder that another program wrote."""

import logging
from pathlib import Path

from regrow.checkpoint.errors import CheckpointError, DamagedStepError
from regrow.checkpoint.format.manifest import MANIFEST
from regrow.checkpoint.format.step_name import METADATA, step_folder_name
from regrow.checkpoint.format.stored_step import StoredStep
from regrow.checkpoint.run.catalog import Catalog
from regrow.checkpoint.storage.base import Storage
from regrow.checkpoint.storage.opening import as_storage

__all__ = ["is_incomplete", "locate_checkpoint", "resolve_foreign"]

log = logging.getLogger(__name__)


def locate_checkpoint(location: Storage | Path | str) -> StoredStep | Storage:
    """The checkpoint meant by `checkpoint.initial_load_path`.

    Returns:
        The newest complete step below a run, opened; else the folder itself, which holds a manifest or `.metadata`.

    Raises:
        CheckpointError: there is none.
    """
    storage = as_storage(location)
    if storage.exists(MANIFEST):
        return storage
    if storage.exists(METADATA):
        _check_foreign(storage)
        return storage
    others: list[str] = []
    for folder in (storage, storage.child("checkpoint")):
        catalog = Catalog(folder)
        for step in reversed(catalog.candidates()):
            try:
                return catalog.open(step)
            except DamagedStepError as error:
                log.warning("step %d in %s is passed over: %s", step, folder.url, error)
                others += [step_folder_name(step)] if folder.exists(f"{step_folder_name(step)}/{METADATA}") else []
    if others:
        raise CheckpointError(
            "checkpoint.initial_load_path must name a step exactly where no manifest proves that it is complete, "
            f"but is {storage.url}; if another program wrote it, give the path of its folder {others[0]}"
        )
    raise CheckpointError(
        f"checkpoint.initial_load_path must be a checkpoint, or a folder with steps, but {storage.url} holds no "
        f"{METADATA}; check the path"
    )


def resolve_foreign(location: Storage | Path | str) -> Storage:
    """The folder of the checkpoint that `locate_checkpoint` finds.

    Raises:
        CheckpointError: there is none.
    """
    found = locate_checkpoint(location)
    return found.storage if isinstance(found, StoredStep) else found


def _check_foreign(step: Storage) -> None:
    """Refuses a step of a run of ours that has lost its manifest, or never had one: it is incomplete.

    Raises:
        CheckpointError: it is one.
    """
    if not is_incomplete(step):
        return
    raise CheckpointError(
        f"{step.url} must have its {MANIFEST}, because a run of Regrow wrote it, but has not: the step is "
        "incomplete; use another one"
    )


def is_incomplete(step: Storage) -> bool:
    """Whether a folder without a manifest is an incomplete step of ours, and not another program's checkpoint."""
    if step.exists(MANIFEST):
        return False
    if any(name.startswith("rank-") and name.endswith(".json") for name in step.names()):
        return True
    around = step.parent()
    return around is not None and (
        any(name.startswith("lease-") for name in around.names())
        or any(around.exists(f"{step_folder_name(n)}/{MANIFEST}") for n in Catalog(around).candidates())
    )
