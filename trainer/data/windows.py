"""Fixed windows over a split of a token store."""

from typing import final

import numpy as np
import numpy.typing as npt

from regrow.trainer.data.token_store import TokenStore

__all__ = ["Windows"]

Int64s = npt.NDArray[np.int64]


@final
class Windows:
    """The split's documents one after another, cut into windows of `seq_len` tokens and their successors.

    A document belongs to the validation split when its content hash falls into the first
    `validation_fraction` of the hash's range, so adding documents never moves one from one split to the other.

    Args:
        store: the corpus.
        seq_len: tokens a window.
        validation_fraction: see above.
        validation: which split.
    """

    def __init__(self, store: TokenStore, seq_len: int, validation_fraction: float, *, validation: bool) -> None:
        threshold = min(int(validation_fraction * 2.0**64), 2**64 - 1)
        held_out = store.hashes < np.uint64(threshold)
        chosen = np.flatnonzero(held_out if validation else ~held_out)
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

    def read(self, window: int, out: Int64s) -> None:
        """Copies a window and the token after it, `seq_len + 1` ids, into `out`."""
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

    def documents(self, window: int) -> Int64s:
        """For each of the window's `seq_len` positions, the number of its document within the window."""
        positions = np.arange(window * self.seq_len, (window + 1) * self.seq_len)
        owners = np.searchsorted(self._ends, positions, side="right")
        relative: Int64s = owners - owners[0]
        return relative
