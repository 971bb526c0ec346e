"""The sequence of samples: the same however it is cut, each source in its own order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regrow.trainer.data.loader import step_batch
from regrow.trainer.data.mixture import StagePlan, as_mixture
from regrow.trainer.data.order import Ids, permute, window_ids
from regrow.trainer.data.samples import Samples, source_seed
from regrow.trainer.data.windows import IGNORE, Int64s, Windows


def in_order(positions: Ids, n: int, seed: int) -> Ids:
    """The windows of one source."""
    return window_ids(positions, np.array([n]), [seed], np.zeros(len(positions), dtype=np.int64))


class Numbered(Windows):
    """Windows whose tokens say which they are; each other label does not count."""

    def __init__(self, first: int, count: int, seq_len: int = 4) -> None:
        self._first, self._count, self.seq_len = first, count, seq_len

    def __len__(self) -> int:
        return self._count

    def read(self, window: int, tokens: Int64s, labels: Int64s, documents: Int64s | None) -> None:
        tokens[:] = labels[:] = self._first + window
        labels[::2] = IGNORE

    def labels(self, windows: Int64s) -> Int64s:
        return np.full(len(windows), self.seq_len // 2, dtype=np.int64)


def mixed(counts: tuple[int, ...] = (5, 7, 11)) -> Samples:
    names = [f"s{i}" for i in range(len(counts))]
    weights = dict(zip(names, (0.5, 0.3, 0.2), strict=True))
    stages = [StagePlan(weights={"s0": 1, "s2": 3}, from_step=6)]
    mixture = as_mixture(weights, stages, seq_len=4, global_batch_size=5)
    windows = [Numbered(100 * i, n) for i, n in enumerate(counts)]
    return Samples(names, windows, [source_seed(3, n) for n in names], mixture, token_bytes=np.arange(400))


@given(first=st.integers(0, 10**12), counts=st.lists(st.integers(1, 20), min_size=1, max_size=5))
def test_it_is_the_same_however_it_is_cut(first: int, counts: list[int]) -> None:
    samples, position = mixed(), first
    whole = samples.ids(first, sum(counts))
    for count in counts:
        part, at = samples.ids(position, count), position - first
        assert part.windows.tolist() == whole.windows[at : at + count].tolist()
        assert part.sources.tolist() == whole.sources[at : at + count].tolist()
        position += count


def test_each_source_is_read_in_its_own_order_across_stages() -> None:
    samples = mixed()
    ids = samples.ids(0, 200)
    for source, n in enumerate((5, 7, 11)):
        own = ids.windows[ids.sources == source]
        assert own.tolist() == in_order(np.arange(len(own)), n, source_seed(3, f"s{source}")).tolist()
    assert not (ids.sources[30:] == 1).any()
    progress = samples.progress(200)
    assert progress["epochs/s0"] == (ids.sources == 0).sum() / 5
    assert progress["tokens/s2"] == 4 * (ids.sources == 2).sum()


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_ranks_know_the_labels_of_all(ranks: int) -> None:
    samples = mixed()
    ids = samples.ids(11, 7)
    parts = [
        step_batch(samples, ids, rank=r, ranks=ranks, micro_batch_size=2, document_mask=False) for r in range(ranks)
    ]
    found = np.zeros(3, dtype=np.int64)
    read = 0
    for part in parts:
        for micro_batch in part.micro_batches:
            assert micro_batch.sources is not None
            counting = (micro_batch.labels != IGNORE).sum(1)
            np.add.at(found, micro_batch.sources.numpy(), counting.numpy())
            read += int(micro_batch.labels[micro_batch.labels != IGNORE].sum())
    assert all(part.labels.tolist() == found.tolist() for part in parts)
    # A token's number is its length here.
    assert sum(part.label_bytes for part in parts) == read


@given(count=st.integers(0, 40))
def test_what_is_spread_is_of_all_sources(count: int) -> None:
    chosen = mixed().spread(count)
    pairs = list(zip(chosen.sources.tolist(), chosen.windows.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs) == min(count, 23)
    assert pairs == sorted(pairs)
    if count >= 10:
        assert set(chosen.sources.tolist()) == {0, 1, 2}


def test_one_source_needs_no_mixture() -> None:
    samples = Samples([""], [Numbered(0, 9)], [4])
    assert samples.ids(5, 30).windows.tolist() == in_order(np.arange(5, 35), 9, 4).tolist()
    assert samples.progress(40) == {}
    assert samples.bytes_of(np.array([1, IGNORE])) == 0
    with pytest.raises(ValueError, match="several sources need a mixture"):
        Samples(["a", "b"], [Numbered(0, 9), Numbered(9, 2)], [4, 5])


@given(
    positions=st.lists(st.integers(0, 10**6), min_size=1, max_size=40),
    sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=4),
    seed=st.integers(0, 2**63 - 1),
    data=st.data(),
)
def test_orders_of_several_sources_are_those_of_each(
    positions: list[int], sizes: list[int], seed: int, data: st.DataObject
) -> None:
    at = np.array(positions)
    sources = np.array([data.draw(st.integers(0, len(sizes) - 1)) for _ in positions])
    seeds = [seed ^ i for i in range(len(sizes))]
    found = window_ids(at, np.array(sizes), seeds, sources)
    for source, n in enumerate(sizes):
        own = at[sources == source]
        for position, window in zip(own.tolist(), found[sources == source].tolist(), strict=True):
            assert window == permute(np.array([position % n]), n, seeds[source], position // n)[0]
