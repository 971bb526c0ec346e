"""Where the documents of a batch begin and end, so that attention keeps within them: no mask of seq × seq is needed.

Shapes: B batch, S positions of the sequence, N segments.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Documents", "describe_documents", "whole_sequences"]

# Positions for each of which the description has room for one more segment, at first.
_PER_SEGMENT = 512


class Documents(NamedTuple):
    """The documents of a batch's rows: what a model hands on to its `Attention` as `mask`.

    Attributes:
        starts: int32 `(B, S)`, the first position of its row that each position may see: its document's first.
        boundaries: int32 `(N + 1,)`, where segments begin and end in the rows laid end to end: 0, …, B · S (the
            `cu_seqlens` of kernels for sequences of several lengths). The end is repeated, so that most batches have
            the same N.
        longest: S, the same for every batch.
        most: bounds a segment's length: a power of two, so that few numbers ever occur, or S.
        prepared: by the window of the layers that use it (0 is none), what their kernel takes: made once a batch by
            `models/attention.py`, on the device.
    """

    starts: Tensor
    boundaries: Tensor
    longest: int
    most: int
    prepared: dict[int, Any] = {}  # noqa: RUF012 - never changed: `_replace` gives another.

    def to(self, device: torch.device) -> "Documents":
        """The same on a device; from pinned memory without waiting."""
        return self._replace(
            starts=self.starts.to(device, non_blocking=True), boundaries=self.boundaries.to(device, non_blocking=True)
        )

    def pin_memory(self) -> "Documents":
        """The same in memory from which a device copies without waiting."""
        return self._replace(starts=self.starts.pin_memory(), boundaries=self.boundaries.pin_memory())


def describe_documents(numbers_BS: Tensor) -> Documents:
    """Describes rows on the host.

    Args:
        numbers_BS: integers `(B, S)` on the CPU, which change where a document begins.
    """
    rows, length = numbers_BS.shape
    begins_BS = torch.ones((rows, length), dtype=torch.bool)
    begins_BS[:, 1:] = numbers_BS[:, 1:] != numbers_BS[:, :-1]
    positions_S = torch.arange(length, dtype=torch.int32)
    starts_BS = positions_S.where(begins_BS, 0).cummax(1).values
    begins_N = begins_BS.flatten().nonzero().flatten()
    boundaries = torch.full((_room(rows, length, len(begins_N)) + 1,), rows * length, dtype=torch.int32)
    boundaries[: len(begins_N)] = begins_N
    most = min(length, 1 << (int(boundaries.diff().max()) - 1).bit_length())
    return Documents(starts_BS, boundaries, length, most)


def whole_sequences(rows: int, length: int, device: torch.device) -> Documents:
    """Rows of one document each, on a device."""
    starts_BS = torch.zeros((rows, length), dtype=torch.int32, device=device)
    boundaries = torch.arange(0, (rows + 1) * length, length, dtype=torch.int32, device=device)
    return Documents(starts_BS, boundaries, length, length)


def _room(rows: int, length: int, needed: int) -> int:
    """Segments that are described: doubled where documents are short, so that few numbers ever occur."""
    room = rows * -(-length // _PER_SEGMENT)
    while room < needed:
        room *= 2
    return room
