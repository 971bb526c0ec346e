"""Reads a step into existing tensors: only the ranges that they need, every byte verified before it is used."""

import functools
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from checkpoint.contents import StoredItem
from checkpoint.errors import CheckpointError, DamagedStepError
from checkpoint.hashing import HASH_CHARS, block_hash, item_hash
from checkpoint.plan import Chunk, chunk_of, local_tensor
from checkpoint.storage.base import RangeReader, Storage
from checkpoint.storage.opening import as_storage

__all__ = [
    "ReadPiece",
    "bytes_to_read",
    "check_names",
    "covered",
    "plan_reads",
    "read_chunk",
    "read_tensors",
]

# What a thread reads at a time; a multiple of every block size.
_WINDOW = 4 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadPiece:
    """The part of a stored chunk that a target needs.

    Attributes:
        item: the stored chunk.
        box: for each dimension (start, stop) of the needed part, in the whole tensor.
        rows: (first, last + 1) row of the stored chunk that is read.
    """

    item: StoredItem
    box: tuple[tuple[int, int], ...]
    rows: tuple[int, int]

    @property
    def row_bytes(self) -> int:
        """Of one row of the stored chunk."""
        return self.item.data_bytes // self.item.shape[0] if self.item.shape else self.item.data_bytes

    @property
    def needed(self) -> tuple[int, int]:
        """The bytes of the rows, counted from the item's first."""
        return self.rows[0] * self.row_bytes, self.rows[1] * self.row_bytes

    @property
    def verified(self) -> tuple[int, int]:
        """The same, widened to whole blocks: what is read."""
        block, (start, stop) = self.item.block_bytes, self.needed
        return start // block * block, min(-(-stop // block) * block, self.item.data_bytes)


def _overlap(item: StoredItem, target: Chunk) -> tuple[tuple[int, int], ...] | None:
    box = []
    for a, n, b, m in zip(item.offset, item.shape, target.offset, target.shape, strict=True):
        start, stop = max(a, b), min(a + n, b + m)
        if start >= stop:
            return None
        box.append((start, stop))
    return tuple(box)


def _pieces(items: Sequence[StoredItem], target: Chunk) -> Iterator[ReadPiece]:
    for item in items:
        box = _overlap(item, target)
        if box is not None:
            rows = (box[0][0] - item.offset[0], box[0][1] - item.offset[0]) if box else (0, 1)
            yield ReadPiece(item=item, box=box, rows=rows)


def _elements(pieces: Sequence[ReadPiece]) -> int:
    return sum(torch.Size([stop - start for start, stop in piece.box]).numel() for piece in pieces)


def covered(items: Sequence[StoredItem], target: Chunk) -> bool:
    """Whether the stored chunks fill a target."""
    return _elements(list(_pieces(items, target))) == torch.Size(target.shape).numel()


def plan_reads(items: Sequence[StoredItem], target: Chunk) -> list[ReadPiece]:
    """The pieces that fill a target.

    Raises:
        DamagedStepError: the stored chunks do not cover it.
    """
    pieces = list(_pieces(items, target))
    found, wanted = _elements(pieces), torch.Size(target.shape).numel()
    if found != wanted:
        raise DamagedStepError(
            f"{target.name} is not whole in the checkpoint: {found} of {wanted} elements are there; the step is "
            "damaged, use another one"
        )
    return pieces


def bytes_to_read(pieces: Sequence[ReadPiece]) -> int:
    """What reading them costs."""
    return sum(stop - start for start, stop in (piece.verified for piece in pieces))


def check_names(
    place: str, items: Sequence[StoredItem], tensors: Mapping[str, Tensor]
) -> Mapping[str, list[StoredItem]]:
    """The stored chunks by tensor, once every tensor is known to be there with its shape and dtype.

    Args:
        place: the step, for messages.
        items: what is stored.
        tensors: what is wanted.

    Raises:
        CheckpointError: one is not.
    """
    stored: dict[str, list[StoredItem]] = defaultdict(list)
    for item in items:
        stored[item.name].append(item)
    missing = [name for name in tensors if name not in stored]
    if missing:
        raise CheckpointError(
            f"{place} must hold {missing[0]}, but does not ({len(missing)} of {len(tensors)} names are missing); "
            "use the model it was saved from, or exclude that part with checkpoint.exclude_from_loading"
        )
    for name, tensor in tensors.items():
        item = stored[name][0]
        if item.global_shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{name} in {place} has shape {item.global_shape}, but the model's has {tuple(tensor.shape)}; "
                "use the model's dimensions that it was saved with"
            )
        if item.torch_dtype != tensor.dtype:
            raise CheckpointError(
                f"{name} in {place} is {item.torch_dtype}, but the model's is {tensor.dtype}; "
                "convert the checkpoint first"
            )
    return stored


def read_tensors(
    place: Storage | Path | str, items: Sequence[StoredItem], tensors: Mapping[str, Tensor], *, threads: int = 4
) -> int:
    """Fills the tensors' local parts in place; returns the bytes read.

    Raises:
        CheckpointError: a name is missing, or has another shape or dtype.
        DamagedStepError: naming file and tensor. The tensors' values are then undefined.
    """
    storage = as_storage(place)
    by_name = check_names(storage.url, items, tensors)
    fills = []
    for name, tensor in tensors.items():
        local = local_tensor(tensor)
        if local.numel():
            target = chunk_of(name, tensor)
            fills += [(piece, target, local) for piece in plan_reads(by_name[name], target)]
    with ExitStack() as opened:
        files = {
            name: opened.enter_context(storage.open(name)) for name in sorted({p.item.file for p, _, _ in fills})
        }
        with ThreadPoolExecutor(threads, thread_name_prefix="read") as pool:
            jobs: list[Future[int]] = []
            for piece, target, local in fills:
                source = _Source(storage.url, files[piece.item.file], piece.item)
                if _is_straight(piece, target, local):
                    jobs += [pool.submit(job) for job in _straight_jobs(source, piece, target, local)]
                else:
                    jobs.append(pool.submit(_fill_box, source, piece, target, local))
            return sum(job.result() for job in jobs)


def read_chunk(
    place: str, files: Mapping[str, RangeReader], items: Sequence[StoredItem], target: Chunk, local: Tensor
) -> int:
    """Fills one box of a tensor from its stored chunks, verified, in this thread; returns the bytes read.

    Args:
        place: the step, for messages.
        files: opened, by name.
        items: the tensor's stored chunks.
        target: which box.
        local: receives it.
    """
    read = 0
    for piece in plan_reads(items, target) if local.numel() else ():
        source = _Source(place, files[piece.item.file], piece.item)
        if _is_straight(piece, target, local):
            read += sum(job() for job in _straight_jobs(source, piece, target, local))
        else:
            read += _fill_box(source, piece, target, local)
    return read


@dataclass(frozen=True, slots=True)
class _Source:
    """A stored chunk in an open file."""

    place: str
    file: RangeReader
    item: StoredItem

    def read(self, start: int, memory: memoryview) -> None:
        """Reads and verifies whole blocks.

        Args:
            start: in the item's bytes, at the beginning of a block.
            memory: to the end of a block, or of the item.
        """
        item = self.item
        if self.file.read_into(item.data + start, memory) < len(memory):
            raise DamagedStepError(
                f"{self.place}/{item.file} ends within {item.name}; the step is damaged, use another one"
            )
        for done in range(0, len(memory), item.block_bytes):
            index = (start + done) // item.block_bytes * HASH_CHARS
            expected = item.blocks[index : index + HASH_CHARS]
            if block_hash(memory[done : done + item.block_bytes]) != expected:
                raise self._damage()

    def check_item(self) -> None:
        """The blocks' hashes against the item's."""
        if item_hash(self.item.blocks) != self.item.hash:
            raise self._damage()

    def _damage(self) -> DamagedStepError:
        return DamagedStepError(
            f"{self.item.name} in {self.place}/{self.item.file} does not match its hash; the step is damaged, use "
            "another one"
        )


_scratch = threading.local()


def _scratch_bytes(size: int) -> Tensor:
    """Memory of this thread's own, warm from the read before."""
    held: Tensor | None = getattr(_scratch, "held", None)
    if held is None or held.numel() < size:
        held = torch.empty(size, dtype=torch.uint8)
        _scratch.held = held
    return held[:size]


def _memory(tensor: Tensor) -> memoryview:
    return memoryview(cast(Any, tensor.numpy()))


def _is_straight(piece: ReadPiece, target: Chunk, local: Tensor) -> bool:
    """Whether the needed bytes lie in the target as they lie in the file."""
    if local.device.type != "cpu" or not local.is_contiguous():
        return False
    whole_rows = all(stop - start == n for (start, stop), n in zip(piece.box[1:], piece.item.shape[1:], strict=True))
    return whole_rows and tuple(target.shape[1:]) == tuple(piece.item.shape[1:])


def _straight_jobs(source: _Source, piece: ReadPiece, target: Chunk, local: Tensor) -> list[Callable[[], int]]:
    """One job per window of a piece that is read straight into its place."""
    source.check_item()
    first = (piece.box[0][0] - target.offset[0]) * piece.row_bytes if piece.box else 0
    destination = _memory(local.reshape(-1).view(torch.uint8))[first : first + piece.needed[1] - piece.needed[0]]
    start, stop = piece.verified
    return [
        functools.partial(_fill_window, source, piece, destination, s, min(s + _WINDOW, stop))
        for s in range(start, stop, _WINDOW)
    ]


def _fill_window(source: _Source, piece: ReadPiece, destination: memoryview, start: int, stop: int) -> int:
    """Blocks that lie within the needed bytes go into their place, those at the edges through scratch memory."""
    block = piece.item.block_bytes
    low, high = piece.needed
    inner_start = min(max(start, -(-low // block) * block), stop)
    inner_stop = stop if stop <= high else max(high // block * block, inner_start)
    for edge_start, edge_stop in ((start, inner_start), (inner_stop, stop)):
        if edge_start < edge_stop:
            scratch = _memory(_scratch_bytes(edge_stop - edge_start))
            source.read(edge_start, scratch)
            a, b = max(edge_start, low), min(edge_stop, high)
            destination[a - low : b - low] = scratch[a - edge_start : b - edge_start]
    if inner_start < inner_stop:
        source.read(inner_start, destination[inner_start - low : inner_stop - low])
    return stop - start


def _fill_box(source: _Source, piece: ReadPiece, target: Chunk, local: Tensor) -> int:
    """Reads window after window and copies the box out of each one's whole rows; the rest is carried on."""
    source.check_item()
    row_bytes, (low, high) = piece.row_bytes, piece.needed
    start, stop = piece.verified
    carried, row = 0, piece.rows[0]
    # The carried bytes end where the next window begins.
    scratch = _scratch_bytes(row_bytes + _WINDOW)
    for position in range(start, stop, _WINDOW):
        end = min(position + _WINDOW, stop)
        source.read(position, _memory(scratch[row_bytes : row_bytes + end - position]))
        first = row_bytes - carried if position > low else row_bytes + low - position
        last = row_bytes + min(end, high) - position
        rows = max(last - first, 0) // row_bytes
        if rows:
            _copy_rows(scratch[first : first + rows * row_bytes], piece, row, rows, target, local)
            row += rows
        left = scratch[first + rows * row_bytes : last]
        carried = left.numel()
        scratch[row_bytes - carried : row_bytes] = left.clone()
    return stop - start


def _copy_rows(raw: Tensor, piece: ReadPiece, row: int, rows: int, target: Chunk, local: Tensor) -> None:
    item = piece.item
    # The rows begin anywhere in a block; a copy aligns them for the dtype.
    raw = raw if raw.data_ptr() % 16 == 0 else raw.clone()
    if not item.shape:
        local.copy_(raw.view(item.torch_dtype).view(()))
        return
    source = raw.view(item.torch_dtype).view(rows, *item.shape[1:])
    destination = local.narrow(0, item.offset[0] + row - target.offset[0], rows)
    for dim, (low, high) in enumerate(piece.box[1:], start=1):
        source = source.narrow(dim, low - item.offset[dim], high - low)
        destination = destination.narrow(dim, low - target.offset[dim], high - low)
    destination.copy_(source)
