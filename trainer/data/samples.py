"""Samples: the endless sequence that a run trains on, of one source or of several by weight.

Sample i is a pure function of (config, i): a mixture says which source it is of and the how many-th of that source's
samples it is, and the source's own order which window that is.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from regrow.trainer.data.mixture import Mixture
from regrow.trainer.data.order import window_ids
from regrow.trainer.data.windows import IGNORE, Int64s, Windows

__all__ = ["SampleIds", "Samples", "source_seed"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class SampleIds:
    """Some samples.

    Attributes:
        windows: their windows within their sources, int64 `(count,)`.
        sources: their sources' places among the names, int64 `(count,)`.
    """

    windows: Int64s
    sources: Int64s

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, which: int | slice) -> "SampleIds":
        chosen = slice(which, which + 1) if isinstance(which, int) else which
        return SampleIds(self.windows[chosen], self.sources[chosen])


def source_seed(seed: int, name: str) -> int:
    """The seed of a source's order where it has none of its own: the run's and the name decide it."""
    digest = hashlib.blake2b(f"source\0{seed}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@final
class Samples:
    """What a split is read as.

    Attributes:
        names: of the sources; one has the empty name where there is no mixture.
        seq_len: positions of a sample.
        within_documents: whether attention must keep within documents, asked for or not.

    Args:
        names: see above.
        windows: of each source.
        seeds: of each source's order.
        mixture: which sample is of which source; None with one source.
        token_bytes: how many bytes of text each id stands for, int64 `(ids,)`; None where that is not known.
    """

    def __init__(
        self,
        names: Sequence[str],
        windows: Sequence[Windows],
        seeds: Sequence[int],
        mixture: Mixture | None = None,
        *,
        token_bytes: Int64s | None = None,
    ) -> None:
        if mixture is None and len(windows) != 1:
            raise ValueError(f"several sources need a mixture, but there are {len(windows)} and none")
        self.names, self.seq_len = tuple(names), windows[0].seq_len
        self._windows, self._seeds, self._mixture = list(windows), list(seeds), mixture
        self._sizes = np.array([len(w) for w in windows], dtype=np.int64)
        self._token_bytes = token_bytes
        self.within_documents = any(w.WITHIN_DOCUMENTS for w in windows)

    def __len__(self) -> int:
        """Windows of all sources."""
        return sum(len(w) for w in self._windows)

    def ids(self, first: int, count: int) -> SampleIds:
        """The samples at positions [first, first + count) of the run; epochs of sources may be straddled.

        Args:
            first: samples consumed before.
            count: how many.
        """
        positions = np.arange(first, first + count, dtype=np.int64)
        sources = np.zeros(count, dtype=np.int64)
        if self._mixture is not None:
            sources, positions = self._mixture.locate(positions)
        return SampleIds(window_ids(positions, self._sizes, self._seeds, sources), sources)

    def spread(self, count: int) -> SampleIds:
        """So many of all windows, or all of them, spread over the sources as they lie one behind the other."""
        lengths = self._sizes
        total = int(lengths.sum())
        count = min(count, total)
        chosen = np.arange(count) * total // max(1, count)
        ends = np.cumsum(lengths)
        sources = np.searchsorted(ends, chosen, side="right")
        return SampleIds(chosen - (ends - lengths)[sources], sources)

    def labels(self, ids: SampleIds) -> Int64s:
        """How many labels the samples have by source, int64 `(sources,)`."""
        out = np.zeros(len(self.names), dtype=np.int64)
        for source in np.unique(ids.sources).tolist():
            out[source] = self._windows[source].labels(ids.windows[ids.sources == source]).sum()
        return out

    def read(self, sample: SampleIds, tokens: Int64s, labels: Int64s, documents: Int64s | None) -> None:
        """Reads one sample; see `Windows.read`."""
        self._windows[int(sample.sources[0])].read(int(sample.windows[0]), tokens, labels, documents)

    def bytes_of(self, labels: Int64s) -> int:
        """How many bytes of text these labels stand for; 0 where that is not known.

        Args:
            labels: of any shape; `IGNORE` stands for none.
        """
        if self._token_bytes is None:
            return 0
        return int(self._token_bytes[labels[labels != IGNORE]].sum())

    def progress(self, position: int) -> dict[str, float]:
        """Of each source before this position of the run: positions read, and epochs; empty with one source."""
        if self._mixture is None:
            return {}
        out: dict[str, float] = {}
        for name, count, windows in zip(
            self.names, self._mixture.counts(position).tolist(), self._windows, strict=True
        ):
            out[f"tokens/{name}"] = count * self.seq_len
            out[f"epochs/{name}"] = count / max(1, len(windows))
        return out
