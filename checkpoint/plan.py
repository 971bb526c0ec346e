"""Which rank writes what, and where in its file: made locally, without collectives, once per layout."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from checkpoint.stream import frame_of

__all__ = ["Chunk", "SavePlan", "chunk_of", "local_tensor", "make_plan"]

_ALIGN = 64
PAGE = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A box of a tensor that this rank holds.

    Attributes:
        name: the tensor's flat name.
        dtype: of the elements.
        global_shape: of the whole tensor.
        offset: where the box begins.
        shape: of the box.
    """

    name: str
    dtype: torch.dtype
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """A chunk's place in this rank's file.

    Attributes:
        chunk: what it is.
        start: where its stream begins in the file.
        size: bytes of the stream.
        data: where the raw bytes begin in the file.
        data_bytes: how many.
    """

    chunk: Chunk
    start: int
    size: int
    data: int
    data_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SavePlan:
    """What this rank writes.

    Attributes:
        items: in the order of the file.
        file_bytes: the file's size, a multiple of the page.
        key: equal as long as the layout is.
    """

    items: tuple[Item, ...]
    file_bytes: int
    key: tuple[Chunk, ...]


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def chunk_of(name: str, tensor: Tensor) -> Chunk:
    """The box that this rank holds of a tensor."""
    if isinstance(tensor, DTensor):
        shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    else:
        shape, offset = tuple(tensor.shape), (0,) * tensor.ndim
    return Chunk(
        name=name,
        dtype=tensor.dtype,
        global_shape=tuple(tensor.shape),
        offset=tuple(offset),
        shape=tuple(shape),
    )


def _writes(name: str, tensor: Tensor, rank: int, ranks: int) -> bool:
    """Whether this rank writes its copy: a hash of the name spreads what several ranks hold evenly over them."""
    pick = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    if not isinstance(tensor, DTensor):
        return pick % ranks == rank
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "a rank outside of the mesh holds no part"
    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, Replicate):
            size = mesh.size(axis)
            if pick % size != coordinate[axis]:
                return False
            pick //= size
    return True


def make_plan(tensors: Mapping[str, Tensor], rank: int, ranks: int) -> SavePlan:
    """Lays this rank's share of the tensors out as a file."""
    position, items, key = 0, [], []
    for name, tensor in tensors.items():
        chunk = chunk_of(name, tensor)
        key.append(chunk)
        if 0 in chunk.shape or not _writes(name, tensor, rank, ranks):
            continue
        frame = frame_of(chunk.dtype, chunk.shape)
        items.append(
            Item(
                chunk=chunk,
                start=position,
                size=frame.size,
                data=position + len(frame.head),
                data_bytes=frame.data_bytes,
            )
        )
        position += -(-frame.size // _ALIGN) * _ALIGN
    return SavePlan(items=tuple(items), file_bytes=-(-position // PAGE) * PAGE, key=tuple(key))


def plan_summary(plan: SavePlan) -> dict[str, Any]:
    """For logs: how much this rank writes."""
    return {"items": len(plan.items), "bytes": plan.file_bytes}
