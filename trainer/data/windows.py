"""Windows: the sequences into which a split of a token store is cut."""

from abc import ABC, abstractmethod
from typing import ClassVar, final

import numpy as np
import numpy.typing as npt

from regrow.trainer.data.token_store import TokenStore

__all__ = ["IGNORE", "ConcatWindows", "Windows", "documents_of_split"]

Int64s = npt.NDArray[np.int64]
# Labels with this value take no part in the loss.
IGNORE = -100


class Windows(ABC):
    """Sequences by number, the same everywhere.

    Attributes:
        seq_len: positions of each.
        WITHIN_DOCUMENTS: whether attention must keep within documents, asked for or not.
    """

    WITHIN_DOCUMENTS: ClassVar[bool] = False
    seq_len: int

    @abstractmethod
    def __len__(self) -> int:
        """How many there are."""

    @abstractmethod
    def read(self, window: int, tokens: Int64s, labels: Int64s, documents: Int64s | None) -> None:
        """Reads one.

        Args:
            window: its number, below `len(self)`.
            tokens: becomes the tokens, int64 `(seq_len,)`.
            labels: becomes what each position is asked for, int64 `(seq_len,)`; `IGNORE` where it is nothing.
            documents: becomes numbers that change where a document begins, int64 `(seq_len,)`; None: not asked for.

        Raises:
            StoreDamagedError: an id is beyond the vocabulary.
        """

    @abstractmethod
    def labels(self, windows: Int64s) -> Int64s:
        """How many labels each of these windows has, without reading them, int64 of the same length."""


def documents_of_split(store: TokenStore, validation_fraction: float, *, validation: bool) -> Int64s:
    """The numbers of a split's documents, rising, int64.

    A document belongs to the validation split when its content hash falls into the first
    `validation_fraction` of the hash's range, so adding documents never moves one from one split to the other.
    """
    threshold = min(int(validation_fraction * 2.0**64), 2**64 - 1)
    held_out = store.hashes < np.uint64(threshold)
    return np.flatnonzero(held_out if validation else ~held_out)


@final
class ConcatWindows(Windows):
    """The split's documents one after another, cut into windows of `seq_len` tokens and their successors.

    Args:
        store: the corpus.
        seq_len: tokens a window.
        validation_fraction: see `documents_of_split`.
        validation: which split.
    """

    def __init__(self, store: TokenStore, seq_len: int, validation_fraction: float, *, validation: bool) -> None:
        chosen = documents_of_split(store, validation_fraction, validation=validation)
        starts = np.cumsum(store.lengths) - store.lengths
        self._store = store
        self.seq_len = seq_len
        self._raw_starts = starts[chosen]
        self._ends = np.cumsum(store.lengths[chosen])
        # A document that does not follow its predecessor in the same shard begins a new run of bytes.
        follows = self._raw_starts[1:] == self._raw_starts[:-1] + store.lengths[chosen][:-1]
        shards = store.shard_of(self._raw_starts)
        self._breaks: npt.NDArray[np.bool_] = (
            np.concatenate([[True], ~(follows & (shards[1:] == shards[:-1]))]) if len(chosen) else np.empty(0, bool)
        )
        total = int(self._ends[-1]) if len(chosen) else 0
        self.count = max(0, (total - 1) // seq_len)

    def __len__(self) -> int:
        return self.count

    def read(self, window: int, tokens: Int64s, labels: Int64s, documents: Int64s | None) -> None:
        both = np.empty(self.seq_len + 1, dtype=np.int64)
        self._read_tokens(window, both)
        tokens[:], labels[:] = both[:-1], both[1:]
        if documents is not None:
            documents[:] = self._documents(window)

    def labels(self, windows: Int64s) -> Int64s:
        return np.full(len(windows), self.seq_len, dtype=np.int64)

    def _read_tokens(self, window: int, out: Int64s) -> None:
        """Copies a window and the token after it."""
        start = window * self.seq_len
        stop = start + self.seq_len + 1
        first = int(np.searchsorted(self._ends, start, side="right"))
        last = int(np.searchsorted(self._ends, stop - 1, side="right"))
        runs = [first, *(first + 1 + np.flatnonzero(self._breaks[first + 1 : last + 1])).tolist()]
        begin_of_first = int(self._ends[first - 1]) if first else 0
        written = 0
        for run, following in zip(runs, [*runs[1:], last + 1], strict=True):
            run_start = int(self._raw_starts[run])
            if run == first:
                run_start += start - begin_of_first
            run_stop = min(stop, int(self._ends[following - 1])) - start
            self._store.read(run_start, out[written:run_stop])
            written = run_stop

    def _documents(self, window: int) -> Int64s:
        """For each of the window's `seq_len` positions, the number of its document within the window."""
        positions = np.arange(window * self.seq_len, (window + 1) * self.seq_len)
        owners = np.searchsorted(self._ends, positions, side="right")
        relative: Int64s = owners - owners[0]
        return relative
