"""Which rank writes what, and where in its file: made locally, without collectives, once per layout."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from checkpoint.stream import frame_of

__all__ = [
    "PAGE",
    "Chunk",
    "Item",
    "LayoutKey",
    "SavePlan",
    "chunk_of",
    "layout_key",
    "local_tensor",
    "make_plan",
    "place_chunks",
    "writer_of",
]

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
    """A chunk's place in one of this rank's files.

    Attributes:
        chunk: what it is.
        file: which of the files, from 0.
        start: where its stream begins in the file.
        size: bytes of the stream.
        data: where the raw bytes begin in the file.
        data_bytes: how many.
    """

    chunk: Chunk
    file: int
    start: int
    size: int
    data: int
    data_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SavePlan:
    """What this rank writes.

    Attributes:
        items: file by file, in the order of the bytes.
        file_bytes: the files' sizes, multiples of the page; none where this rank writes nothing.
        id: a hash over the above: equal as long as the layout is.
    """

    items: tuple[Item, ...]
    file_bytes: tuple[int, ...]
    id: str

    @property
    def total_bytes(self) -> int:
        """Of all files."""
        return sum(self.file_bytes)


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


def writer_of(name: str, tensor: Tensor, ranks: int) -> int:
    """The rank that writes this rank's chunk: a hash of the name spreads what several hold evenly over them."""
    pick = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    if not isinstance(tensor, DTensor):
        return pick % ranks
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "a rank outside of the mesh holds no part"
    place = list(coordinate)
    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, Replicate):
            place[axis] = pick % mesh.size(axis)
            pick //= mesh.size(axis)
    return int(mesh.mesh[tuple(place)].item())


LayoutKey = tuple[tuple[object, ...], ...]


def layout_key(tensors: Mapping[str, Tensor]) -> LayoutKey:
    """Equal exactly as long as a plan for these tensors stays right; costs a microsecond a tensor."""
    return tuple(
        (name, t.dtype, t.shape, t.to_local().shape, t.device_mesh, t.placements)
        if isinstance(t, DTensor)
        else (name, t.dtype, t.shape)
        for name, t in tensors.items()
    )


def make_plan(tensors: Mapping[str, Tensor], rank: int, ranks: int, files: int = 1) -> SavePlan:
    """Lays this rank's share of the tensors out as files."""
    mine = (chunk_of(name, tensor) for name, tensor in tensors.items() if writer_of(name, tensor, ranks) == rank)
    return place_chunks([chunk for chunk in mine if 0 not in chunk.shape], files)


def place_chunks(chunks: Sequence[Chunk], files: int = 1) -> SavePlan:
    """Gives each chunk its place, filling one file after the other up to an even share of the bytes."""
    share = sum(frame_of(c.dtype, c.shape).size for c in chunks) / files
    items: list[Item] = []
    sizes: list[int] = []
    position = filled = 0
    for chunk in chunks:
        frame = frame_of(chunk.dtype, chunk.shape)
        if position and filled >= share * (len(sizes) + 1):
            sizes.append(-(-position // PAGE) * PAGE)
            position = 0
        items.append(
            Item(
                chunk=chunk,
                file=len(sizes),
                start=position,
                size=frame.size,
                data=position + len(frame.head),
                data_bytes=frame.data_bytes,
            )
        )
        filled += frame.size
        position += -(-frame.size // _ALIGN) * _ALIGN
    if position:
        sizes.append(-(-position // PAGE) * PAGE)
    digest = hashlib.blake2b(digest_size=8)
    for item in items:
        digest.update(repr((item.chunk, item.file, item.start)).encode())
    return SavePlan(items=tuple(items), file_bytes=tuple(sizes), id=digest.hexdigest())
