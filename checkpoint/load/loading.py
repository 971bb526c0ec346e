"""Loading a step, ours or another program's, into existing tensors.

Ours are read by their manifests, and every byte is verified before it is copied. Those written by others (plain
DCP, torchtitan's) are read without verification, and without running what a pickle holds.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from regrow.checkpoint.errors import CheckpointError
from regrow.checkpoint.format.layout import chunk_of, local_tensor, writer_of
from regrow.checkpoint.format.rank_manifest import StoredChunk
from regrow.checkpoint.format.stored_step import StoredStep, is_verified
from regrow.checkpoint.load.read_plan import check_names, covered
from regrow.checkpoint.load.reader import read_tensors
from regrow.checkpoint.ranks import rank_and_count
from regrow.checkpoint.sources.dcp import DcpSource
from regrow.checkpoint.storage.base import Storage
from regrow.checkpoint.storage.opening import as_storage

__all__ = ["is_verified", "load_step", "load_tensors"]

_THREADS = 4


def load_tensors(
    location: StoredStep | Storage | Path | str,
    tensors: Mapping[str, Tensor],
    group: dist.ProcessGroup | None,
    known: Collection[str] | None = None,
) -> int:
    """Reads a step into existing tensors, resharding to whatever layout they have.

    Args:
        location: the step's folder, or the step where it was opened before.
        tensors: by flat name; DTensors receive this rank's part.
        group: of all ranks, on the CPU; None for one process without torch.distributed.
        known: every name that the model has, on whichever rank; a weight of another name is then an error.

    Returns:
        The bytes that this rank read.

    Raises:
        CheckpointError: a name is missing there, or is not known, or has another shape or dtype, or no memory here.
        DamagedStepError: a byte is not what was written.
    """
    is_first = rank_and_count(group)[0] == 0
    step = location if isinstance(location, StoredStep) else StoredStep.find(location, check_files=is_first)
    if step is not None:
        return load_step(step, tensors, group, known)
    assert not isinstance(location, StoredStep)
    return _load_foreign(as_storage(location), tensors)


def load_step(
    step: StoredStep,
    tensors: Mapping[str, Tensor],
    group: dist.ProcessGroup | None,
    known: Collection[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """As `load_tensors`, from one of our steps; its manifest is not read again.

    Args:
        step: the step.
        tensors: as there.
        group: as there.
        known: as there.
        progress: told the bytes that this rank has read, and in all.
    """
    _check_memory(tensors)
    rank, ranks = rank_and_count(group)
    if rank == 0:
        step.check_metadata()
    items = _needed_items(step, tensors, ranks)
    if known is not None:
        _check_known(step.url, items, known)
    return read_tensors(step.storage, items, tensors, progress=progress)


def _needed_items(step: StoredStep, tensors: Mapping[str, Tensor], ranks: int) -> list[StoredChunk]:
    """The items that a load reads; under the layout that wrote them, a few ranks' manifests hold them all."""
    if ranks == step.manifest.ranks and ranks > 1:
        writers = sorted({writer_of(name, tensor, range(ranks)) for name, tensor in tensors.items()})
        items = step.items_of(writers)
        by_name: dict[str, list[StoredChunk]] = defaultdict(list)
        for item in items:
            by_name[item.name].append(item)
        if all(
            by_name[name]
            and all(item.global_shape == tuple(tensor.shape) for item in by_name[name])
            and covered(by_name[name], chunk_of(name, tensor))
            for name, tensor in tensors.items()
        ):
            return items
    return step.items_of(range(step.manifest.ranks))


def _check_memory(tensors: Mapping[str, Tensor]) -> None:
    """Whether there is something to load into: copying into a tensor on the meta device does nothing."""
    name = next((n for n, t in tensors.items() if t.is_meta or local_tensor(t).is_meta), None)
    if name is not None:
        raise CheckpointError(
            f"{name} must have memory to be loaded into, but is on the meta device; give the model memory first, for "
            "instance by to_empty(device=...)"
        )


def _check_known(url: str, items: Iterable[StoredChunk], known: Collection[str]) -> None:
    """Whether the model has all weights that are stored; the optimizer's state goes with them."""
    others = ("optimizer.", "train_state.")
    found = sorted({i.name for i in items if i.name not in known and not i.name.startswith(others)})
    if found:
        raise CheckpointError(
            f"{url} must hold the model's weights alone, but holds {found[0]} ({len(found)} such names); use the "
            "model it was saved from, or start from it with checkpoint.initial_load_path and "
            "checkpoint.load_strict=false"
        )


def _load_foreign(folder: Storage, tensors: Mapping[str, Tensor]) -> int:
    _check_memory(tensors)
    with DcpSource(folder) as source:
        name = next((n for n in tensors if n in source.objects), None)
        if name is not None:
            raise CheckpointError(f"{name} in {source.place} must be a tensor, but is not; give another checkpoint")
        check_names(source.place, source.infos, tensors)
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="read") as pool:
            return sum(pool.map(lambda pair: _read_foreign(source, *pair), tensors.items()))


@torch.no_grad()
def _read_foreign(source: DcpSource, name: str, tensor: Tensor) -> int:
    """Fills this rank's part of one tensor; returns its bytes."""
    chunk, local = chunk_of(name, tensor), local_tensor(tensor)
    if not local.numel():
        return 0
    source.read_into(name, tuple((o, o + n) for o, n in zip(chunk.offset, chunk.shape, strict=True)), local)
    return local.numel() * local.element_size()
