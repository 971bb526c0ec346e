"""Tensors that lie on a disk in some format, read box by box: what every reader and converter is written against."""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, cast

import torch
from torch import Tensor

from regrow.checkpoint.errors import CheckpointError
from regrow.checkpoint.storage.base import RangeReader

__all__ = [
    "MOST_DIMS",
    "Box",
    "TensorInfo",
    "TensorSource",
    "rows_of",
    "segments",
    "whole",
]

# What a file that is read may say of a tensor: torch takes no more dimensions.
MOST_DIMS = 64
# What a thread holds of a tensor while it copies it.
_PIECE_BYTES = 32 << 20

# For each dimension (start, stop).
Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """A stored tensor's element type and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.dtype.itemsize * math.prod(self.shape)


class TensorSource(ABC):
    """Tensors by name. Methods may be called from several threads.

    Attributes:
        place: where they lie, for messages.
        infos: what is there.
    """

    place: str
    infos: Mapping[str, TensorInfo]

    @abstractmethod
    def read(self, name: str, box: Box) -> Tensor:
        """A box of one tensor, contiguous, on the CPU, with the stored dtype.

        Raises:
            CheckpointError: the bytes are not there, or not those that were written.
        """

    def read_into(self, name: str, box: Box, target: Tensor) -> None:
        """Copies a box into memory of its shape, cast to its type, in pieces that bound what is held beside it.

        Raises:
            CheckpointError: as `read`.
        """
        for piece in segments(box, self.infos[name].dtype.itemsize, _PIECE_BYTES):
            part = target
            for dim, ((start, stop), (origin, _)) in enumerate(zip(piece, box, strict=True)):
                part = part.narrow(dim, start - origin, stop - start)
            part.copy_(self.read(name, piece))

    def close(self) -> None:
        """Closes open files."""
        return

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def whole(shape: Sequence[int]) -> Box:
    """The box of all of a tensor."""
    return tuple((0, n) for n in shape)


def segments(box: Box, itemsize: int, limit: int) -> Iterator[Box]:
    """Cuts a box into boxes of at most `limit` bytes each (or one row of the last dimension cut), in row-major order.

    Concatenated, their elements are the box's: a writer may put one after another.
    """
    sizes = [stop - start for start, stop in box]
    if math.prod(sizes) * itemsize <= limit or not box:
        yield box
        return
    # The first dimension whose single index fits is cut into runs, those before it into single indices.
    cut = 0
    while cut < len(sizes) - 1 and math.prod(sizes[cut + 1 :]) * itemsize > limit:
        cut += 1
    run = max(1, limit // max(1, math.prod(sizes[cut + 1 :]) * itemsize))
    outer = [[(i, i + 1) for i in range(*box[d])] for d in range(cut)]
    start, stop = box[cut]
    for prefix in itertools.product(*outer):
        for low in range(start, stop, run):
            yield (*prefix, (low, min(low + run, stop)), *box[cut + 1 :])


def rows_of(file: RangeReader, start: int, info: TensorInfo, box: Box, what: str) -> Tensor:
    """A box out of raw bytes that begin at `start`: its rows are read whole, then narrowed.

    Raises:
        CheckpointError: the file ends too soon.
    """
    if not box:
        return _read_raw(file, start, info.nbytes, what).view(info.dtype).view(())
    shape, cut = info.shape, box
    # A single index of the first dimensions is one range of bytes further in.
    while len(cut) > 1 and cut[0][1] - cut[0][0] == 1:
        start += cut[0][0] * info.dtype.itemsize * math.prod(shape[1:])
        shape, cut = shape[1:], cut[1:]
    row = info.dtype.itemsize * math.prod(shape[1:])
    first, last = cut[0]
    raw = _read_raw(file, start + first * row, (last - first) * row, what)
    values = raw.view(info.dtype).view(last - first, *shape[1:])
    for dim, (low, high) in enumerate(cut[1:], start=1):
        values = values.narrow(dim, low, high - low)
    return values.contiguous().view([stop - start for start, stop in box])


def _read_raw(file: RangeReader, start: int, size: int, what: str) -> Tensor:
    raw = torch.empty(size, dtype=torch.uint8)
    if file.read_into(start, memoryview(cast(Any, raw.numpy()))) < size:
        raise CheckpointError(f"{what} is cut short; copy or download it again")
    return raw
