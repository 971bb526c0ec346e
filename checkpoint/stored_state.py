"""What a `Checkpointer` writes into a step's manifest beside the tensors, and reads from it again."""

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from msgspec import Meta
from torch import Tensor

from regrow.checkpoint.documents import Count, DocumentError, convert_document
from regrow.checkpoint.errors import CheckpointError, DamagedStepError
from regrow.checkpoint.format.rank_manifest import DTYPES
from regrow.checkpoint.format.stored_step import StoredStep, chunks_by_name, infos_of
from regrow.checkpoint.nested_state import named_tensors

__all__ = ["empty_tensors", "memory_for", "state_of"]

_Shape = Annotated[tuple[Count, ...], Meta(max_length=64)]
# Where the manifest keeps dtype and shape of tensors without elements.
_EMPTY = "empty"


def empty_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the manifest says of tensors without elements, where there are any: no file holds them."""
    found = {n: (str(t.dtype).removeprefix("torch."), list(t.shape)) for n, t in tensors.items() if not t.numel()}
    return {_EMPTY: found} if found else {}


def state_of(step: StoredStep) -> dict[str, Any]:
    """The state that was saved with the tensors; of a step of Regrow's trainer, the trainer's."""
    return dict(step.train_state.get("state", step.train_state))


def memory_for(step: StoredStep) -> dict[str, Tensor]:
    """Room for all of a nested state's tensors, whole, on the CPU.

    Raises:
        CheckpointError: the step holds no nested state.
        DamagedStepError: its manifest contradicts itself.
    """
    infos = infos_of(chunks_by_name(step.url, step.items()))
    room = {name: torch.empty(info.shape, dtype=info.dtype) for name, info in infos.items()} | _empty(step)
    misplaced = room.keys() ^ set(named_tensors(state_of(step)))
    if misplaced:
        raise CheckpointError(
            f"{step.url} must hold a nested state to be read by load_state, but {min(misplaced)} is not both among "
            "its tensors and in its state; read it into tensors with load"
        )
    return room


def _empty(step: StoredStep) -> dict[str, Tensor]:
    """The tensors without elements."""
    try:
        found = convert_document(step.train_state.get(_EMPTY, {}), dict[str, tuple[str, _Shape]])
    except DocumentError as error:
        raise DamagedStepError(f"{step.url} is damaged: its empty tensors cannot be read ({error})") from None
    wrong = next((n for n, (dtype, shape) in found.items() if dtype not in DTYPES or 0 not in shape), None)
    if wrong is not None:
        raise DamagedStepError(f"{step.url} is damaged: {wrong} must have no elements and a dtype of torch's")
    return {name: torch.empty(shape, dtype=DTYPES[dtype]) for name, (dtype, shape) in found.items()}
