"""Which rank writes what, and where in its file: made locally, without collectives, once per layout."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import Placement, Shard

from regrow.checkpoint.format.torch_archive import frame_of
from regrow.checkpoint.storage.base import PAGE
from regrow.torch_compat import StridedShard

__all__ = [
    "Chunk",
    "Item",
    "LayoutKey",
    "SavePlan",
    "chunk_of",
    "layout_key",
    "local_box",
    "local_tensor",
    "make_plan",
    "place_chunks",
    "spread",
    "writer_of",
]

_ALIGN = 64


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


def local_box(
    shape: Sequence[int], mesh: DeviceMesh, placements: Sequence[Placement]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and offset of this rank's part.

    torch's own function is wrong where FSDP cuts what tensor parallelism has cut unevenly. Each axis cuts what is
    left into pieces of the same size, the last ones smaller or empty; FSDP's (strided) cuts come last.
    """
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "a rank outside of the mesh holds no part"
    size, offset = list(shape), [0] * len(shape)
    # In torch 2.11 strided shards are shards, too; in 2.13 they are not.
    strided = [axis for axis, p in enumerate(placements) if isinstance(p, StridedShard)]
    plain = [axis for axis, p in enumerate(placements) if isinstance(p, Shard) and axis not in strided]
    for axis in (*plain, *strided):
        dim = int(getattr(placements[axis], "dim", 0))
        piece = -(-size[dim] // mesh.size(axis))
        start = min(coordinate[axis] * piece, size[dim])
        offset[dim] += start
        size[dim] = min(start + piece, size[dim]) - start
    return tuple(size), tuple(offset)


def chunk_of(name: str, tensor: Tensor) -> Chunk:
    """The box that this rank holds of a tensor."""
    if isinstance(tensor, DTensor):
        shape, offset = local_box(tensor.shape, tensor.device_mesh, tensor.placements)
    else:
        shape, offset = tuple(tensor.shape), (0,) * tensor.ndim
    return Chunk(
        name=name,
        dtype=tensor.dtype,
        global_shape=tuple(tensor.shape),
        offset=offset,
        shape=shape,
    )


def spread(name: str) -> int:
    """A number that spreads names evenly, the same on every rank."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def writer_of(name: str, tensor: Tensor, owner_ranks: Sequence[int]) -> int:
    """The rank that writes this rank's chunk: a hash of the name spreads what several hold evenly over them."""
    pick = spread(name)
    if not isinstance(tensor, DTensor):
        return owner_ranks[pick % len(owner_ranks)]
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "a rank outside of the mesh holds no part"
    writer = list(coordinate)
    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, Replicate):
            writer[axis] = pick % mesh.size(axis)
            pick //= mesh.size(axis)
    return int(mesh.mesh[tuple(writer)].item())


LayoutKey = tuple[tuple[object, ...], ...]


def layout_key(tensors: Mapping[str, Tensor]) -> LayoutKey:
    """Equal exactly as long as a plan for these tensors stays right; costs a microsecond a tensor."""
    return tuple(
        (name, t.dtype, t.shape, t.to_local().shape, t.device_mesh, t.placements)
        if isinstance(t, DTensor)
        else (name, t.dtype, t.shape)
        for name, t in tensors.items()
    )


def make_plan(
    tensors: Mapping[str, Tensor],
    rank: int,
    ranks: int,
    files: int = 1,
    owner_ranks: Mapping[str, Sequence[int]] | None = None,
) -> SavePlan:
    """Lays this rank's share of the tensors out as files.

    Args:
        tensors: what this rank holds, by flat name.
        rank: this rank.
        ranks: how many there are.
        files: to spread the share over.
        owner_ranks: the ranks that hold a tensor between them, where that is not all of them (a pipeline's stages).
            A tensor that others hold, too, is left to them where this rank is not among them.
    """
    found = {name: (owner_ranks or {}).get(name, range(ranks)) for name in tensors}
    mine = (
        chunk_of(name, tensor)
        for name, tensor in tensors.items()
        if rank in found[name] and writer_of(name, tensor, found[name]) == rank
    )
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
