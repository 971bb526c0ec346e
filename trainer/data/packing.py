"""Best-fit packing of documents into windows of a fixed number of positions; pure, and the same everywhere.

A position takes a token and is asked for the next one of the same document. A document's last token is asked for but
never taken, so L tokens have L - 1 labels and fill L - 1 positions: none is left without a label, and no label comes
from another document. A document of one token has no label, and fills none.

Pieces are placed by decreasing length, each into the window with the least room that holds it (best-fit decreasing;
Johnson et al. 1974, "Worst-case performance bounds for simple one-dimensional packing algorithms"). Of pieces as long
as each other the earlier in the corpus comes first; of windows with as much room, the one that came to have it last.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from itertools import pairwise
from typing import final

import numpy as np
import numpy.typing as npt

from regrow.trainer.data.config import TooLong
from regrow.trainer.data.source import DataError

__all__ = ["Packed", "Tally", "pack", "tally"]

Int64s = npt.NDArray[np.int64]


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Tally:
    """What a rule does to documents, before any is placed.

    Attributes:
        documents: in all.
        dropped: documents of which nothing is in any window, those of one token among them.
        of_one_token: documents that have no label.
        cut: documents whose end is in no window.
        split: documents in several pieces.
        pieces: to be placed.
        labels: of all pieces, which fill as many positions.
        tokens_lost: tokens that are the label of no position, although another token of their document precedes them.
    """

    documents: int
    dropped: int
    of_one_token: int
    cut: int
    split: int
    pieces: int
    labels: int
    tokens_lost: int


@final
@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Packed:
    """Pieces of documents, window after window; within a window in the documents' order.

    A piece of n positions has the n + 1 tokens of its document from its first on: all but the last are taken, all but
    the first are labels.

    Attributes:
        capacity: positions of a window.
        documents: the number of each piece's document, int64 `(pieces,)`.
        firsts: the piece's first token within the document, int64 `(pieces,)`.
        positions: those that the piece fills, int64 `(pieces,)`, from 1 to `capacity`.
        window_starts: the first piece of each window, and the number of pieces, int64 `(windows + 1,)`.
        tally: what became of documents.
    """

    capacity: int
    documents: Int64s
    firsts: Int64s
    positions: Int64s
    window_starts: Int64s
    tally: Tally

    def __len__(self) -> int:
        """Windows."""
        return len(self.window_starts) - 1

    @property
    def fill_rate(self) -> float:
        """The part of all windows' positions that is filled; 1 where there is no window."""
        return self.tally.labels / (len(self) * self.capacity) if len(self) else 1.0

    def fits(self, lengths: Int64s) -> bool:
        """Whether every piece lies within its document, and every window holds its pieces."""
        starts, positions = self.window_starts, self.positions
        # The bounds come first: what lies within them does not overflow.
        if starts[0] != 0 or starts[-1] != len(positions) or starts.min() < 0 or starts.max() > len(positions):
            return False
        if not len(positions):
            return len(starts) == 1
        if (np.diff(starts) < 1).any():
            return False
        if self.documents.min() < 0 or self.documents.max() >= len(lengths):
            return False
        if self.firsts.min() < 0 or positions.min() < 1 or positions.max() > self.capacity:
            return False
        within = self.firsts < lengths[self.documents] - positions
        return bool(within.all() and np.add.reduceat(positions, starts[:-1]).max() <= self.capacity)


def tally(lengths: Int64s, capacity: int, too_long: TooLong) -> Tally:
    """What `pack` does to documents; arguments and errors are its own."""
    _check(lengths, capacity)
    labels = lengths - 1
    longer = labels > capacity
    kept = _kept(labels, capacity, too_long)
    count = int(longer.sum())
    of_one_token = int((labels == 0).sum())
    return Tally(
        documents=len(lengths),
        dropped=of_one_token + (count if too_long is TooLong.drop else 0),
        of_one_token=of_one_token,
        cut=count if too_long is TooLong.cut else 0,
        split=count if too_long is TooLong.split else 0,
        pieces=int((-(-kept // capacity)).sum()),
        labels=int(kept.sum()),
        tokens_lost=int(labels.sum() - kept.sum()),
    )


def pack(lengths: Int64s, capacity: int, too_long: TooLong) -> Packed:
    """Packs documents into windows.

    Args:
        lengths: tokens of each document, its end of text included, int64 `(documents,)`.
        capacity: positions of a window, which are the tokens of a sequence.
        too_long: what becomes of a document of more than `capacity + 1` tokens.

    Raises:
        DataError: a document has no token, or a window no position.
    """
    counts = tally(lengths, capacity, too_long)
    documents, firsts, positions = _pieces(lengths, capacity, too_long)
    by_length = np.argsort(-positions, kind="stable")
    windows = np.empty(len(positions), dtype=np.int64)
    windows[by_length] = _best_fit(positions[by_length], capacity)
    order = np.argsort(windows, kind="stable")
    return Packed(
        capacity=capacity,
        documents=documents[order],
        firsts=firsts[order],
        positions=positions[order],
        window_starts=np.concatenate([[0], np.cumsum(np.bincount(windows))]).astype(np.int64),
        tally=counts,
    )


def _check(lengths: Int64s, capacity: int) -> None:
    if capacity < 1:
        raise DataError(f"data.seq_len must be at least 1 for packing, but is {capacity}; use the model's context")
    if len(lengths) and lengths.min() < 1:
        number = int(np.argmax(lengths < 1))
        raise DataError(
            f"documents to pack must have at least 1 token, but document {number} has {lengths[number]}; leave it out"
        )


def _kept(labels: Int64s, capacity: int, too_long: TooLong) -> Int64s:
    """The labels of each document that windows will hold, int64 `(documents,)`; they are its first ones."""
    if too_long is TooLong.drop:
        return np.where(labels <= capacity, labels, 0)
    return np.minimum(labels, capacity) if too_long is TooLong.cut else labels


def _pieces(lengths: Int64s, capacity: int, too_long: TooLong) -> tuple[Int64s, Int64s, Int64s]:
    """Document, first token and positions of every piece, in the documents' order."""
    kept = _kept(lengths - 1, capacity, too_long)
    counts = -(-kept // capacity)
    documents = np.repeat(np.arange(len(kept)), counts)
    firsts = (np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)) * capacity
    return documents, firsts, np.minimum(kept[documents] - firsts, capacity)


def _best_fit(sizes: Int64s, capacity: int) -> Int64s:
    """The window of each piece, int64 `(pieces,)`; windows are numbered as they are opened.

    Pieces of one size are placed together: where a window takes one of them, it stays the one with the least room for
    the next until it holds no more. So the cost is that of distinct sizes and rooms rather than of pieces.

    Args:
        sizes: from 1 to `capacity`, falling.
        capacity: of a window.
    """
    open_windows = _OpenWindows()
    out = np.empty(len(sizes), dtype=np.int64)
    opened = 0
    changes = np.flatnonzero(np.diff(sizes)) + 1
    for start, stop in pairwise([0, *changes.tolist(), len(sizes)]):
        while start < stop:
            size = int(sizes[start])
            room = open_windows.least_room(size) or capacity
            each = room // size
            wanted = -(-(stop - start) // each)
            if room < capacity:
                windows = open_windows.take(room, wanted)
            else:
                windows = np.arange(opened, opened + wanted)
                opened += wanted
            placed = min(len(windows) * each, stop - start)
            out[start : start + placed] = np.repeat(windows, each)[:placed]
            in_last = placed - (len(windows) - 1) * each
            open_windows.add(room - each * size, windows[:-1])
            open_windows.add(room - in_last * size, windows[-1:])
            start += placed
    return out


@final
class _OpenWindows:
    """Windows that still have room, by it; the last that came to have a room is the first to be taken."""

    def __init__(self) -> None:
        self._rooms: list[int] = []  # rising
        self._windows: dict[int, list[Int64s]] = {}

    def least_room(self, size: int) -> int | None:
        """The least room of a window that holds `size`; None where no window does."""
        at = bisect_left(self._rooms, size)
        return self._rooms[at] if at < len(self._rooms) else None

    def take(self, room: int, wanted: int) -> Int64s:
        """At least one and at most `wanted` of the windows that have this room, the last that came to it first."""
        stack = self._windows[room]
        last = stack.pop()
        if len(last) > wanted:
            stack.append(last[:-wanted])
        elif not stack:
            del self._windows[room]
            del self._rooms[bisect_left(self._rooms, room)]
        return last[-wanted:][::-1]

    def add(self, room: int, windows: Int64s) -> None:
        """Takes windows in, in the order in which they came to have this room."""
        if not room or not len(windows):
            return
        if room not in self._windows:
            insort(self._rooms, room)
            self._windows[room] = []
        self._windows[room].append(windows)
