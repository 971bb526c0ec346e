"""Packing: every label once, no window over its capacity, the windows of plain best-fit decreasing, and full ones."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regrow.trainer.data.config import TooLong
from regrow.trainer.data.packing import Packed, pack, tally
from regrow.trainer.data.source import DataError

Int64s = npt.NDArray[np.int64]
Piece = tuple[int, int, int]

CAPACITIES = st.integers(1, 24)
RULES = st.sampled_from(TooLong)
# Few sizes, so that rooms and lengths tie, and many that fill a window exactly or by one more or less.
LENGTHS = st.lists(st.one_of(st.integers(1, 8), st.integers(1, 80)), max_size=60)


def int64s(values: list[int]) -> Int64s:
    return np.array(values, dtype=np.int64)


def log_normal(count: int, seed: int) -> Int64s:
    lengths = np.random.default_rng(seed).lognormal(np.log(600), 1.2, count)
    return np.maximum(lengths, 1).astype(np.int64)


def windows_of(packed: Packed) -> list[list[Piece]]:
    pieces = list(zip(packed.documents.tolist(), packed.firsts.tolist(), packed.positions.tolist(), strict=True))
    starts = packed.window_starts.tolist()
    return [pieces[a:b] for a, b in pairwise(starts)]


def labels_of(packed: Packed) -> Counter[tuple[int, int]]:
    """How often each token, as (document, token within it), is a label."""
    pieces = [piece for window in windows_of(packed) for piece in window]
    return Counter((d, token) for d, first, n in pieces for token in range(first + 1, first + n + 1))


def expected_labels(lengths: list[int], capacity: int, too_long: TooLong) -> Counter[tuple[int, int]]:
    out: Counter[tuple[int, int]] = Counter()
    for document, length in enumerate(lengths):
        labels = [(document, token) for token in range(1, length)]
        if len(labels) > capacity:
            labels = {TooLong.drop: [], TooLong.cut: labels[:capacity], TooLong.split: labels}[too_long]
        out.update(labels)
    return out


def plain_best_fit(lengths: list[int], capacity: int, too_long: TooLong) -> list[list[Piece]]:
    """Best-fit decreasing as it is said: one piece after another, each compared with every window."""
    pieces: list[Piece] = []
    for document, length in enumerate(lengths):
        labels = length - 1
        if labels > capacity and too_long is TooLong.drop:
            continue
        if labels > capacity and too_long is TooLong.cut:
            labels = capacity
        pieces += [(document, first, min(capacity, labels - first)) for first in range(0, labels, capacity)]
    windows: list[list[Piece]] = []
    rooms: list[int] = []
    changed: list[int] = []
    for now, piece in enumerate(sorted(pieces, key=lambda p: (-p[2], p[0], p[1]))):
        fitting = [w for w in range(len(windows)) if rooms[w] >= piece[2]]
        if not fitting:
            windows.append([])
            rooms.append(capacity)
            changed.append(-1)
        best = min(fitting, key=lambda w: (rooms[w], -changed[w]), default=len(windows) - 1)
        windows[best].append(piece)
        rooms[best] -= piece[2]
        changed[best] = now
    return [sorted(window) for window in windows]


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, capacity=CAPACITIES, too_long=RULES)
def test_every_label_that_the_rule_keeps_is_in_one_window(
    lengths: list[int], capacity: int, too_long: TooLong
) -> None:
    packed = pack(int64s(lengths), capacity, too_long)
    assert labels_of(packed) == expected_labels(lengths, capacity, too_long)
    for document, first, positions in zip(packed.documents, packed.firsts, packed.positions, strict=True):
        assert 0 <= first < first + positions < lengths[document]
    for window in windows_of(packed):
        assert 0 < sum(n for _, _, n in window) <= capacity
    assert packed.fits(int64s(lengths))


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, capacity=CAPACITIES, too_long=RULES)
def test_the_windows_are_those_of_plain_best_fit_decreasing(
    lengths: list[int], capacity: int, too_long: TooLong
) -> None:
    assert windows_of(pack(int64s(lengths), capacity, too_long)) == plain_best_fit(lengths, capacity, too_long)


def test_the_windows_of_real_lengths_are_those_of_plain_best_fit_decreasing() -> None:
    lengths = log_normal(1500, seed=3)
    for too_long in TooLong:
        assert windows_of(pack(lengths, 4096, too_long)) == plain_best_fit(lengths.tolist(), 4096, too_long)


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, capacity=CAPACITIES, too_long=RULES)
def test_documents_and_lost_tokens_are_counted(lengths: list[int], capacity: int, too_long: TooLong) -> None:
    packed = pack(int64s(lengths), capacity, too_long)
    kept, every = labels_of(packed), expected_labels(lengths, capacity, TooLong.split)
    per_document = Counter(d for d, _ in kept)
    pieces = Counter(packed.documents.tolist())
    counts = packed.tally
    assert counts == tally(int64s(lengths), capacity, too_long)
    assert counts.documents == len(lengths)
    assert counts.of_one_token == lengths.count(1)
    assert counts.dropped == sum(per_document[d] == 0 for d in range(len(lengths)))
    assert counts.cut == sum(0 < per_document[d] < length - 1 for d, length in enumerate(lengths))
    assert counts.split == sum(n > 1 for n in pieces.values())
    assert (counts.pieces, counts.labels) == (pieces.total(), kept.total())
    assert counts.tokens_lost == (every - kept).total()
    assert too_long is not TooLong.split or counts.tokens_lost == 0
    if len(packed):
        assert packed.fill_rate == kept.total() / (capacity * len(windows_of(packed)))


def test_a_document_that_just_fits_is_whole() -> None:
    """Four positions take four tokens and are asked for four: a document of five."""
    for too_long in TooLong:
        packed = pack(int64s([5]), 4, too_long)
        assert windows_of(packed) == [[(0, 0, 4)]]
        assert (packed.tally.dropped, packed.tally.cut, packed.tally.split) == (0, 0, 0)
    assert windows_of(pack(int64s([6]), 4, TooLong.drop)) == []
    assert windows_of(pack(int64s([6]), 4, TooLong.cut)) == [[(0, 0, 4)]]
    assert windows_of(pack(int64s([6]), 4, TooLong.split)) == [[(0, 0, 4)], [(0, 4, 1)]]


def test_what_is_left_of_a_split_document_joins_others() -> None:
    packed = pack(int64s([3, 1, 11, 3]), 4, TooLong.split)
    assert windows_of(packed) == [[(2, 0, 4)], [(2, 4, 4)], [(0, 0, 2), (2, 8, 2)], [(3, 0, 2)]]
    assert packed.fill_rate == 14 / 16


@pytest.mark.parametrize("too_long", TooLong)
def test_log_normal_lengths_fill_98_percent_of_windows(too_long: TooLong) -> None:
    lengths = log_normal(50_000, seed=0)
    packed = pack(lengths, 4096, too_long)
    assert packed.fill_rate >= 0.98
    assert packed.fill_rate == packed.positions.sum() / (4096 * len(packed))
    assert packed.fits(lengths)
    if too_long is TooLong.split:
        assert packed.positions.sum() == (lengths - 1).sum()


def test_packing_is_the_same_each_time() -> None:
    lengths = log_normal(20_000, seed=1)
    one, other = (pack(lengths.copy(), 2048, TooLong.split) for _ in range(2))
    for name in ("documents", "firsts", "positions", "window_starts"):
        assert getattr(one, name).dtype == np.int64
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("lengths", [[], [1], [1, 1, 1]])
@pytest.mark.parametrize("too_long", TooLong)
def test_documents_without_labels_make_no_window(lengths: list[int], too_long: TooLong) -> None:
    packed = pack(int64s(lengths), 8, too_long)
    assert len(packed) == 0
    assert packed.window_starts.tolist() == [0]
    assert packed.fill_rate == 1.0
    assert packed.tally.dropped == packed.tally.of_one_token == len(lengths)
    assert packed.fits(int64s(lengths))


def test_documents_without_tokens_are_refused() -> None:
    with pytest.raises(DataError, match=r"at least 1 token, but document 2 has 0; leave it out"):
        pack(int64s([3, 1, 0, 4]), 8, TooLong.cut)
    with pytest.raises(DataError, match=r"at least 1 token, but document 0 has -5"):
        pack(int64s([-5]), 8, TooLong.cut)


@pytest.mark.parametrize("capacity", [0, -3])
def test_a_window_without_positions_is_refused(capacity: int) -> None:
    with pytest.raises(DataError, match=f"at least 1 for packing, but is {capacity}; use"):
        pack(int64s([3]), capacity, TooLong.cut)


HUGE = 2**62
WRONG = {
    "a document that is not there": {"documents": [2, 1, 0]},
    "a document before the first": {"documents": [-1, 1, 0]},
    "a token before the first": {"firsts": [-1, 0, 0]},
    "a token after the last": {"firsts": [0, 1, 0]},
    "a token far away": {"firsts": [HUGE, 0, 0]},
    "no position": {"positions": [0, 2, 2]},
    "positions beyond the document": {"positions": [4, 4, 2]},
    "positions beyond the window": {"positions": [5, 2, 2]},
    "a sum that overflows": {"positions": [HUGE, HUGE, HUGE]},
    "windows with too much": {"window_starts": [0, 3]},
    "a window without a piece": {"window_starts": [0, 0, 1, 3]},
    "windows that fall": {"window_starts": [0, 2, 1, 3]},
    "windows that begin late": {"window_starts": [1, 3]},
    "windows that end early": {"window_starts": [0, 1]},
    "windows beyond all pieces": {"window_starts": [0, HUGE, -HUGE, 3]},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_pieces_that_do_not_fit_their_documents_are_told(wrong: dict[str, list[int]]) -> None:
    lengths = int64s([7, 3])
    packed = pack(lengths, 4, TooLong.split)
    assert windows_of(packed) == [[(0, 0, 4)], [(0, 4, 2), (1, 0, 2)]]
    packed = replace(packed, documents=int64s([0, 1, 0]), firsts=int64s([0, 0, 4]), positions=int64s([4, 2, 2]))
    assert packed.fits(lengths)
    changed = {name: int64s(values) for name, values in wrong.items()}
    packed = replace(
        packed,
        documents=changed.get("documents", packed.documents),
        firsts=changed.get("firsts", packed.firsts),
        positions=changed.get("positions", packed.positions),
        window_starts=changed.get("window_starts", packed.window_starts),
    )
    assert not packed.fits(lengths)
