"""How needed bytes get from a file into a tensor, each block verified before it is used.

Runs of blocks go straight into the tensors' memory, several items by one request; where rows have to be cut, they go
through memory of the thread's own. Bytes are hashed as soon as they arrive, while a core's cache still has them.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast, final

import torch
from torch import Tensor

from regrow.checkpoint.errors import DamagedStepError
from regrow.checkpoint.format.hashing import HASH_CHARS, block_hashes, item_hash
from regrow.checkpoint.format.layout import Chunk
from regrow.checkpoint.format.rank_manifest import StoredChunk
from regrow.checkpoint.load.read_plan import ReadSlice
from regrow.checkpoint.memory import raw_bytes
from regrow.checkpoint.storage.base import RangeReader

__all__ = ["BlockRange", "ReadOp", "StridedRead", "forget_scratch", "requests_of", "split_blocks"]

# What lies between two items, and is read along rather than asked for apart: the frame of a `torch.save` stream.
_GAP = 4096
# The system takes 1024 pieces of memory at a time.
_MOST_PARTS = 400
# Where frames are read into; it is never looked at.
_unused = memoryview(bytearray(_GAP))


class BlockRange(NamedTuple):
    """Whole blocks of an item, and the memory that receives them.

    Attributes:
        item: the stored chunk.
        start: the first byte in it.
        memory: as long as the blocks.
        copy: what is copied once it is verified, and where to, where not all of the blocks is needed.
    """

    item: StoredChunk
    start: int
    memory: memoryview
    copy: tuple[memoryview, memoryview] | None


class ReadOp(ABC):
    """What one thread does at a time.

    Attributes:
        url: the step, for messages.
        file: the file's name.
        start: the first byte in it.
        stop: behind the last one.
    """

    __slots__ = ("file", "place", "start", "stop")

    def __init__(self, url: str, file: str, start: int, stop: int) -> None:
        self.place, self.file, self.start, self.stop = url, file, start, stop

    @abstractmethod
    def run(self, file: RangeReader) -> int:
        """Reads, verifies, fills; returns the bytes read."""

    def verify(self, item: StoredChunk, start: int, memory: memoryview) -> None:
        """Blocks of an item against their hashes.

        Raises:
            DamagedStepError: one differs.
        """
        block = item.block_bytes
        first, last = start // block, -(-(start + len(memory)) // block)
        if block_hashes(memory, block) != item.blocks[first * HASH_CHARS : last * HASH_CHARS]:
            raise _damage(self.place, item)

    def ends_early(self, item: StoredChunk) -> DamagedStepError:
        """The file is too short."""
        return DamagedStepError(
            f"{self.place}/{item.file} ends within {item.name}; the step is damaged, use another one"
        )


def _damage(url: str, item: StoredChunk) -> DamagedStepError:
    return DamagedStepError(
        f"{item.name} in {url}/{item.file} does not match its hash; the step is damaged, use another one"
    )


def split_blocks(url: str, piece: ReadSlice, target: Chunk, local: Tensor) -> list[BlockRange] | None:
    """A piece that lies in the target as it lies in the file; None where its rows have to be cut.

    Raises:
        DamagedStepError: the item's hash is not that of its blocks.
    """
    item = piece.item
    if item_hash(item.blocks) != item.hash:
        raise _damage(url, item)
    if not _is_straight(piece, target, local):
        return None
    memory = _memory(local)
    if target.shape == item.shape and target.offset == item.offset:
        return [BlockRange(item, 0, memory, None)]
    low, high = piece.needed
    if len(memory) != high - low:
        first = (piece.box[0][0] - target.offset[0]) * piece.row_bytes
        memory = memory[first : first + high - low]
    start, stop = piece.verified
    if (start, stop) == (low, high):
        return [BlockRange(item, start, memory, None)]
    return _with_edges(piece, memory, start, stop)


def _with_edges(piece: ReadSlice, memory: memoryview, start: int, stop: int) -> list[BlockRange]:
    """Blocks within the needed bytes go into their place, those at the edges through memory of their own."""
    block, (low, high) = piece.item.block_bytes, piece.needed
    inner_start = min(-(-low // block) * block, stop)
    inner_stop = stop if stop <= high else max(high // block * block, inner_start)
    parts = []
    for edge_start, edge_stop in ((start, inner_start), (inner_stop, stop)):
        if edge_start < edge_stop:
            edge = memoryview(bytearray(edge_stop - edge_start))
            a, b = max(edge_start, low), min(edge_stop, high)
            copy = (memory[a - low : b - low], edge[a - edge_start : b - edge_start])
            parts.append(BlockRange(piece.item, edge_start, edge, copy))
    if inner_start < inner_stop:
        inner = memory[inner_start - low : inner_stop - low]
        parts.insert(1 if start < inner_start else 0, BlockRange(piece.item, inner_start, inner, None))
    return parts


def _is_straight(piece: ReadSlice, target: Chunk, local: Tensor) -> bool:
    """Whether the needed bytes lie in the target as they lie in the file."""
    if local.device.type != "cpu" or not local.is_contiguous():
        return False
    if target.shape[1:] != piece.item.shape[1:]:
        return False
    return all(stop - start == n for (start, stop), n in zip(piece.box[1:], piece.item.shape[1:], strict=True))


@final
class _Request(ReadOp):
    """Parts that follow each other in a file, asked for at once."""

    __slots__ = ("parts",)

    def __init__(self, url: str, parts: list[BlockRange]) -> None:
        first, last = parts[0], parts[-1]
        stop = last.item.data + last.start + len(last.memory)
        super().__init__(url, first.item.file, first.item.data + first.start, stop)
        self.parts = parts

    def run(self, file: RangeReader) -> int:
        memories, position = [], self.start
        for item, start, memory, _ in self.parts:
            if item.data + start > position:
                memories.append(_unused[: item.data + start - position])
            memories.append(memory)
            position = item.data + start + len(memory)
        read = file.read_into_all(self.start, memories)
        for item, start, memory, copy in self.parts:
            if item.data + start + len(memory) > self.start + read:
                raise self.ends_early(item)
            self.verify(item, start, memory)
            if copy is not None:
                copy[0][:] = copy[1]
        return read


def requests_of(url: str, parts: Sequence[BlockRange], request_bytes: int) -> Iterator[ReadOp]:
    """Groups parts, sorted by file and place in it, into requests of at most about so many bytes."""
    group: list[BlockRange] = []
    size = 0
    for part in _segments(parts, request_bytes):
        if group:
            last = group[-1]
            gap = part.item.data + part.start - (last.item.data + last.start + len(last.memory))
            fits = size + len(part.memory) <= request_bytes and len(group) < _MOST_PARTS
            if part.item.file != last.item.file or not 0 <= gap <= _GAP or not fits:
                yield _Request(url, group)
                group, size = [], 0
        group.append(part)
        size += len(part.memory)
    if group:
        yield _Request(url, group)


def _segments(parts: Sequence[BlockRange], request_bytes: int) -> Iterator[BlockRange]:
    """The same bytes in parts that one request can hold, of whole blocks each."""
    for part in parts:
        size, step = len(part.memory), max(request_bytes, part.item.block_bytes)
        if size <= step:
            yield part
            continue
        for start in range(0, size, step):
            yield BlockRange(part.item, part.start + start, part.memory[start : start + step], None)


@final
class StridedRead(ReadOp):
    """A piece whose rows have to be cut, or copied to an accelerator.

    Args:
        url: the step, for messages.
        piece: what is needed.
        target: the box that `local` is.
        local: receives it.
    """

    __slots__ = ("local", "piece", "target")

    def __init__(self, url: str, piece: ReadSlice, target: Chunk, local: Tensor) -> None:
        start, stop = piece.verified
        super().__init__(url, piece.item.file, piece.item.data + start, piece.item.data + stop)
        self.piece, self.target, self.local = piece, target, local

    def run(self, file: RangeReader) -> int:
        """Reads window after window and copies the box out of each one's whole rows; the rest is carried on."""
        item, row_bytes, (low, high) = self.piece.item, self.piece.row_bytes, self.piece.needed
        start, stop = self.piece.verified
        window = max(file.request_bytes, item.block_bytes)
        carried, row = 0, self.piece.rows[0]
        # The carried bytes end where the next window begins.
        scratch = _scratch_bytes(row_bytes + window)
        for position in range(start, stop, window):
            end = min(position + window, stop)
            memory = _memory(scratch[row_bytes : row_bytes + end - position])
            if file.read_into(item.data + position, memory) < len(memory):
                raise self.ends_early(item)
            self.verify(item, position, memory)
            first = row_bytes - carried if position > low else row_bytes + low - position
            last = row_bytes + min(end, high) - position
            rows = max(last - first, 0) // row_bytes
            if rows:
                self._copy_rows(scratch[first : first + rows * row_bytes], row, rows)
                row += rows
            left = scratch[first + rows * row_bytes : last]
            carried = left.numel()
            scratch[row_bytes - carried : row_bytes] = left.clone()
        return stop - start

    def _copy_rows(self, raw: Tensor, row: int, rows: int) -> None:
        item = self.piece.item
        # The rows begin anywhere in a block; a copy aligns them for the dtype.
        raw = raw if raw.data_ptr() % 16 == 0 else raw.clone()
        if not item.shape:
            self.local.copy_(raw.view(item.torch_dtype).view(()))
            return
        source = raw.view(item.torch_dtype).view(rows, *item.shape[1:])
        destination = self.local.narrow(0, item.offset[0] + row - self.target.offset[0], rows)
        for dim, (low, high) in enumerate(self.piece.box[1:], start=1):
            source = source.narrow(dim, low - item.offset[dim], high - low)
            destination = destination.narrow(dim, low - self.target.offset[dim], high - low)
        destination.copy_(source)


_scratch = threading.local()


def forget_scratch() -> None:
    """Gives this thread's memory back."""
    _scratch.held = None


def _scratch_bytes(size: int) -> Tensor:
    """Memory of this thread's own, warm from the read before."""
    held: Tensor | None = getattr(_scratch, "held", None)
    if held is None or held.numel() < size:
        held = torch.empty(size, dtype=torch.uint8)
        _scratch.held = held
    return held[:size]


def _memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor."""
    if tensor.ndim and tensor.stride(-1) == 1:
        # The short way, which takes half of the time: there can be many tensors.
        return memoryview(cast(Any, tensor.view(torch.uint8).numpy())).cast("B")
    return memoryview(cast(Any, raw_bytes(tensor).numpy()))
