"""Which tokens of a store are labels."""

from typing import Protocol, final

import numpy as np
import numpy.typing as npt

__all__ = ["ArrayMask", "LabelMask"]

Int64s = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


class LabelMask(Protocol):
    """Which tokens of a store are labels: in chats, those that the assistant says."""

    def __len__(self) -> int:
        """Tokens of the store."""

    def read(self, start: int, out: Bools) -> None:
        """Says of the tokens from global offset `start` on whether they are labels, bool `(count,)`."""

    def count(self, starts: Int64s, stops: Int64s) -> Int64s:
        """How many of the tokens [start, stop) are labels, for each of these ranges, which do not overlap."""


@final
class ArrayMask:
    """A label mask in arrays, which may be mapped.

    Args:
        parts: one behind the other; what is not 0 is a label. No range that is asked for lies in two of them.
    """

    def __init__(self, *parts: npt.NDArray[np.bool_] | npt.NDArray[np.uint8]) -> None:
        self._parts = [part.view(np.uint8) for part in parts]
        self._starts = np.cumsum([0, *(len(part) for part in parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, out: Bools) -> None:
        """See `LabelMask`."""
        part = int(np.searchsorted(self._starts, start, side="right")) - 1
        offset = start - int(self._starts[part])
        np.not_equal(self._parts[part][offset : offset + len(out)], 0, out=out)

    def count(self, starts: Int64s, stops: Int64s) -> Int64s:
        """See `LabelMask`."""
        out = np.zeros(len(starts), dtype=np.int64)
        owners = np.searchsorted(self._starts, starts, side="right") - 1
        order = np.argsort(starts, kind="stable")
        for part in np.unique(owners).tolist():
            chosen = order[owners[order] == part]
            # What lies between two ranges is summed too, and left out.
            bounds = np.stack([starts[chosen], stops[chosen]], axis=1).ravel() - self._starts[part]
            values = np.concatenate([self._parts[part][: bounds[-1]] != 0, [False]])
            out[chosen] = np.add.reduceat(values, bounds, dtype=np.int64)[::2]
        return np.where(stops > starts, out, 0)
