"""The last step's save where it holds weights alone: as a checkpoint, or as a Hugging Face folder."""

import logging
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from regrow.checkpoint.config import AsyncMode
from regrow.checkpoint.errors import CheckpointError
from regrow.checkpoint.format.layout import local_tensor
from regrow.checkpoint.format.manifest import Manifest
from regrow.checkpoint.save.saver import StepSaver
from regrow.trainer.checkpoint_plans import LastSave
from regrow.trainer.export_folder import export_step, remove_leftovers
from regrow.trainer.hf_folder import HfExport
from regrow.trainer.parallel.context import ParallelContext

__all__ = ["cast_weights", "save_in_hf"]

log = logging.getLogger(__name__)


def cast_weights(tensors: Mapping[str, Tensor], dtype: torch.dtype, context: ParallelContext) -> dict[str, Tensor]:
    """Copies in another floating-point type.

    Raises:
        CheckpointError: on all ranks, where one of them has a value beyond what the type can hold.
    """
    problem: str | None = None
    cast: dict[str, Tensor] = {}
    try:
        cast = {name: _cast(name, tensor, dtype) for name, tensor in tensors.items()}
    except CheckpointError as error:
        problem = str(error)
    problems: list[str | None] = [None] * context.world_size
    dist.all_gather_object(problems, problem, group=context.cpu_group)
    found = next((p for p in problems if p is not None), None)
    if found is not None:
        raise CheckpointError(found)
    return cast


@torch.no_grad()
def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.dtype.is_floating_point or tensor.dtype == dtype:
        return tensor
    cast = tensor.to(dtype)
    if bool((local_tensor(cast).isinf() & local_tensor(tensor).isfinite()).any()):
        raise CheckpointError(
            f"checkpoint.export_dtype must be able to hold every value, but {name} goes beyond "
            f"{torch.finfo(dtype).max:g}, where {str(dtype).removeprefix('torch.')} ends; use bfloat16"
        )
    return cast


def save_in_hf(
    tensors: Mapping[str, Tensor],
    manifest: Manifest,
    last: LastSave,
    export: HfExport,
    context: ParallelContext,
    owner_ranks: Mapping[str, Sequence[int]],
) -> None:
    """All ranks write their shards aside; rank 0 makes the folder of them, and all learn how it ended.

    Raises:
        CheckpointError: on all ranks, where it failed.
    """
    work = last.folder / ".weights"
    if context.is_main:
        remove_leftovers(last.folder)
        work.mkdir(parents=True)
    dist.barrier(group=context.cpu_group)
    saver = StepSaver(work, AsyncMode.disabled, context.device, context.cpu_group)
    (result,) = saver.save(tensors, manifest, owner_ranks)
    saver.close()
    problem = [result.error]
    if context.is_main and result.url is not None:
        try:
            log.info("saved %s", export_step(result.url, last.folder, export, manifest.step))
        except (ValueError, OSError) as error:
            problem = [str(error)]
        remove_leftovers(last.folder)
    dist.broadcast_object_list(problem, group=context.cpu_group, group_src=0)
    if problem[0] is not None:
        raise CheckpointError(f"step {manifest.step} was not saved as a Hugging Face folder: {problem[0]}")
