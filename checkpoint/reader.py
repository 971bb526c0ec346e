"""Reads a step into existing tensors: only the ranges that they need, every byte verified before it is used."""

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from checkpoint.contents import StoredItem
from checkpoint.errors import DamagedStepError
from checkpoint.hashing import HASH_CHARS, block_hash, item_hash
from checkpoint.plan import Chunk, chunk_of, local_tensor
from checkpoint.read_plan import ReadPiece, check_names, plan_reads
from checkpoint.storage.base import RangeReader, Storage
from checkpoint.storage.opening import as_storage

__all__ = ["read_chunk", "read_tensors"]

# What a thread reads at a time; a multiple of every block size.
_WINDOW = 4 << 20


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
