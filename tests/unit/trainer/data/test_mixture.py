"""Mixtures: shares as written, an order within one sample of them, stages, and what was read staying as it was."""

import itertools
import math
import pickle
import re
import time
from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from regrow.trainer.data.mixture import Mixture, Stage, StagePlan, as_mixture, as_weights, continued
from regrow.trainer.data.source import DataError

FAR = 10**12


def shares(parts: list[int]) -> tuple[Fraction, ...]:
    return tuple(Fraction(part, sum(parts)) for part in parts)


def parts_of(sources: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, 40), min_size=sources, max_size=sources).filter(any)


@st.composite
def mixtures(draw: st.DrawFn, sources: int | None = None) -> Mixture:
    """Up to four stages over up to five sources."""
    count = draw(st.integers(1, 5)) if sources is None else sources
    firsts = sorted(draw(st.sets(st.integers(1, 120), max_size=3)) | {0})
    stages = tuple(Stage(first, shares(draw(parts_of(count)))) for first in firsts)
    return Mixture(tuple("abcde"[:count]), stages)


def walk(mixture: Mixture, samples: int) -> list[tuple[int, int]]:
    """Source and number of each sample, found one after another."""
    total = [0] * len(mixture.names)
    found = []
    for first, last in itertools.pairwise([*(s.first_sample for s in mixture.stages), samples]):
        weights = next(s.weights for s in mixture.stages if s.first_sample == first)
        taken = [0] * len(weights)
        for place in range(last - first):
            _, source = min(
                (math.ceil((k + 1) / w), s)
                for s, (w, k) in enumerate(zip(weights, taken, strict=True))
                if w > 0 and math.floor(k / w) <= place
            )
            found.append((source, total[source]))
            taken[source] += 1
            total[source] += 1
    return found


def located(mixture: Mixture, first: int, last: int) -> list[tuple[int, int]]:
    sources, samples = mixture.locate(np.arange(first, last, dtype=np.int64))
    assert sources.dtype == samples.dtype == np.int64
    return list(zip(sources.tolist(), samples.tolist(), strict=True))


def three(*stages: tuple[int, list[int]]) -> Mixture:
    return Mixture(("a", "b", "c"), tuple(Stage(first, shares(parts)) for first, parts in stages))


# Weights


def test_weights_are_the_decimals_as_written() -> None:
    assert as_weights({"web": 0.7, "code": 0.2, "books": "0.1"}) == {
        "web": Fraction(7, 10),
        "code": Fraction(1, 5),
        "books": Fraction(1, 10),
    }
    assert as_weights({"a": 1, "b": "2e0", "c": 0, "d": 0.0}) == {
        "a": Fraction(1, 3),
        "b": Fraction(2, 3),
        "c": Fraction(0),
        "d": Fraction(0),
    }
    assert as_weights({"a": np.float64(0.1), "b": 0.3}) == {"a": Fraction(1, 4), "b": Fraction(3, 4)}


@settings(max_examples=50, deadline=None)
@given(parts=st.integers(1, 6).flatmap(parts_of), decimals=st.integers(0, 9))
def test_weights_keep_their_ratios_wherever_the_point_is(parts: list[int], decimals: int) -> None:
    weights = as_weights({str(i): f"{part}e-{decimals}" for i, part in enumerate(parts)})
    assert tuple(weights.values()) == shares(parts)
    assert sum(weights.values()) == 1


@pytest.mark.parametrize(
    "value", [-0.1, "-1", math.nan, math.inf, -math.inf, "much", "", True, "1e-19", "1e99999999", "0." + "3" * 40]
)
def test_a_weight_that_is_none_is_refused(value: float | str) -> None:
    with pytest.raises(DataError, match=re.escape("data.sources.web.weight must be 0, or a number from 1e-18")):
        as_weights({"code": 0.5, "web": value})


def test_weights_that_are_all_0_or_none_are_refused() -> None:
    with pytest.raises(DataError, match="data.sources.a.weight, data.sources.b.weight must not all be 0"):
        as_weights({"a": 0, "b": 0.0})
    with pytest.raises(DataError, match="data.sources must name at least one source"):
        as_weights({})


def test_weights_that_are_too_fine_are_refused_with_rounded_ones() -> None:
    weights = {"web": 1 / 3, "code": 2 / 3, "rare": 0.0002}
    with pytest.raises(DataError) as refused:
        as_weights(weights)
    message = str(refused.value)
    assert message.startswith(
        "data.sources.web.weight must be so round that the sources' order repeats within 1,048,576"
    )
    remedy = dict(re.findall(r"data\.sources\.(\w+)\.weight=([\d.]+)", message))
    assert remedy == {"web": "0.3333", "code": "0.6665", "rare": "0.0002"}
    assert as_weights(remedy)


@settings(max_examples=50, deadline=None)
@given(weights=st.dictionaries(st.sampled_from("abcdef"), st.floats(1e-6, 1.0), min_size=2, max_size=6))
def test_the_remedy_for_weights_that_are_too_fine_is_taken(weights: dict[str, float]) -> None:
    try:
        as_weights(weights)
    except DataError as error:
        remedy = dict(re.findall(r"data\.sources\.(\w+)\.weight=([\d.]+)", str(error)))
        if remedy:
            rounded = as_weights(remedy)
            total = sum(weights.values())
            assert all(abs(float(rounded[name]) - weights[name] / total) < 1e-3 for name in weights)
        else:
            assert "use shares of 1 that are rounded to 6 decimals" in str(error)


def test_many_weights_that_are_too_fine_get_a_short_sentence() -> None:
    with pytest.raises(DataError) as refused:
        as_weights({f"s{i}": 1 + i / 7 for i in range(200)})
    assert str(refused.value).endswith("use shares of 1 that are rounded to 4 decimals")


# The order


@settings(max_examples=40, deadline=None)
@given(parts=st.integers(1, 12).flatmap(lambda n: st.lists(st.integers(0, 500), min_size=n, max_size=n).filter(any)))
def test_each_prefix_of_any_length_is_within_one_sample_of_the_weights(parts: list[int]) -> None:
    mixture = Mixture(tuple(map(str, range(len(parts)))), (Stage(0, shares(parts)),))
    period, total = sum(parts), sum(parts)
    sources, _ = mixture.locate(np.arange(period, dtype=np.int64))
    counts = np.cumsum(sources[:, None] == np.arange(len(parts)), axis=0)
    targets = np.arange(1, period + 1)[:, None] * np.array(parts)
    assert (np.abs(counts * total - targets) < total).all()
    # After a period all are exactly where they should be, and it begins again.
    assert counts[-1].tolist() == parts
    assert np.array_equal(mixture.locate(np.arange(FAR * period, FAR * period + period))[0], sources)


@settings(max_examples=10, deadline=None)
@given(parts=st.lists(st.integers(1, 10_000), min_size=2, max_size=30))
def test_long_periods_stay_within_one_sample(parts: list[int]) -> None:
    mixture = Mixture(tuple(map(str, range(len(parts)))), (Stage(0, shares(parts)),))
    period = sum(parts)
    sources, _ = mixture.locate(np.arange(period, dtype=np.int64))
    for source, part in enumerate(parts):
        counts = np.cumsum(sources == source)
        assert (np.abs(counts * period - np.arange(1, period + 1) * part) < period).all()


@settings(max_examples=40, deadline=None)
@given(mixture=mixtures(), beyond=st.integers(1, 60))
def test_samples_are_located_as_a_walk_finds_them(mixture: Mixture, beyond: int) -> None:
    samples = mixture.stages[-1].first_sample + beyond
    walked = walk(mixture, samples)
    assert located(mixture, 0, samples) == walked
    order = np.random.default_rng(beyond).permutation(samples)
    sources, numbers = mixture.locate(order)
    assert list(zip(sources.tolist(), numbers.tolist(), strict=True)) == [walked[i] for i in order]
    for position in range(samples + 1):
        counts = mixture.counts(position).tolist()
        assert counts == [sum(s == source for s, _ in walked[:position]) for source in range(len(mixture.names))]


@settings(max_examples=50, deadline=None)
@given(mixture=mixtures(sources=3), stage=st.integers(0, 3), length=st.integers(1, 200))
def test_each_stage_is_within_one_sample_of_its_weights_from_its_start(
    mixture: Mixture, stage: int, length: int
) -> None:
    stage = min(stage, len(mixture.stages) - 1)
    first = mixture.stages[stage].first_sample
    if stage + 1 < len(mixture.stages):
        length = min(length, mixture.stages[stage + 1].first_sample - first)
    taken = mixture.counts(first + length) - mixture.counts(first)
    assert all(abs(int(k) - length * w) < 1 for k, w in zip(taken, mixture.stages[stage].weights, strict=True))


def test_the_order_of_a_period_is_fixed_for_ever() -> None:
    # By hand: web's samples may stand from 0 1 2 4 5 7 8 on and before 2 3 5 6 8 9 10, code's from 0 5 and before 5 10.
    mixture = as_mixture({"web": 0.7, "code": 0.2, "books": 0.1}, seq_len=8, global_batch_size=4)
    assert mixture.locate(np.arange(20))[0].tolist() == [0, 0, 0, 1, 0, 0, 1, 0, 0, 2] * 2
    assert mixture.locate(np.arange(10))[1].tolist() == [0, 1, 2, 0, 3, 4, 1, 5, 6, 0]


@settings(max_examples=50, deadline=None)
@given(mixture=mixtures(), source=st.integers(0, 4), sample=st.integers(0, 100))
def test_the_position_of_a_sources_sample_is_where_it_is_located(mixture: Mixture, source: int, sample: int) -> None:
    source = source % len(mixture.names)
    position = mixture.position_of(source, sample)
    if position is None:
        assert mixture.stages[-1].weights[source] == 0
        assert mixture.counts(FAR)[source] <= sample
    else:
        assert located(mixture, position, position + 1) == [(source, sample)]


@settings(max_examples=50, deadline=None)
@given(mixture=mixtures(), far=st.sampled_from([FAR, 10**15, 2**62 - 500]))
def test_far_positions_are_exact(mixture: Mixture, far: int) -> None:
    """By Python's own integers: whole periods since the last stage began, and the rest by a walk."""
    last = mixture.stages[-1]
    period = math.lcm(*(w.denominator for w in last.weights))
    periods, rest = divmod(far - last.first_sample, period)
    whole = [int(w * period) * periods for w in last.weights]
    near = walk(mixture, last.first_sample + rest + 5)[-5:]
    assert located(mixture, far, far + 5) == [(source, sample + whole[source]) for source, sample in near]
    counts = mixture.counts(far)
    assert int(counts.sum()) == far
    assert counts.tolist() == [
        int(near_count) + w for near_count, w in zip(mixture.counts(last.first_sample + rest), whole, strict=True)
    ]


def test_a_position_is_found_as_fast_far_out_as_at_the_start() -> None:
    mixture = as_mixture({"a": "0.33333", "b": "0.33333", "c": "0.33334"}, seq_len=8, global_batch_size=4)

    def fastest(first: int) -> float:
        positions = np.arange(first, first + 4096)
        mixture.locate(positions)
        times = []
        for _ in range(30):
            start = time.perf_counter()
            mixture.locate(positions)
            mixture.counts(first)
            times.append(time.perf_counter() - start)
        return min(times)

    assert fastest(FAR) < 3 * fastest(0) + 1e-4


def test_the_longest_period_is_made_in_time() -> None:
    parts = [524_287, 262_144, 131_072, 65_536, 32_768, 16_384, 16_384, 1]
    start = time.process_time()
    mixture = Mixture(tuple("abcdefgh"), (Stage(0, shares(parts)),))
    assert mixture.counts(2**20).tolist() == parts
    assert time.process_time() - start < 5


def test_a_mixture_is_a_value_and_pickled_as_its_weights() -> None:
    mixture = three((0, [333_333, 333_333, 333_334]), (1000, [1, 0, 1]))
    mixture.locate(np.arange(10))
    pickled = pickle.dumps(mixture)
    assert len(pickled) < 1000
    again = pickle.loads(pickled)
    assert again == mixture
    assert hash(again) == hash(mixture)
    assert located(again, FAR, FAR + 20) == located(mixture, FAR, FAR + 20)
    with pytest.raises(AttributeError):
        again.names = ()


# Stages as a config has them


def test_stages_begin_at_steps_or_at_the_next_step_after_tokens() -> None:
    mixture = as_mixture(
        {"web": 0.7, "code": 0.3},
        [
            StagePlan(from_step=100, weights={"web": 0.2, "code": 0.8}),
            StagePlan(from_tokens=100 * 96 + 97, weights={"code": 1}),
            StagePlan(from_tokens=200 * 96, weights={"web": 3, "code": 1}),
        ],
        seq_len=8,
        global_batch_size=12,
    )
    assert mixture == Mixture(
        ("web", "code"),
        (
            Stage(0, (Fraction(7, 10), Fraction(3, 10))),
            Stage(1200, (Fraction(1, 5), Fraction(4, 5))),
            Stage(102 * 12, (Fraction(0), Fraction(1))),
            Stage(2400, (Fraction(3, 4), Fraction(1, 4))),
        ),
    )


def test_a_stage_from_the_beginning_replaces_the_sources_weights() -> None:
    plans = [StagePlan(from_step=0, weights={"b": 1}), StagePlan(from_step=5, weights={"a": 1})]
    mixture = as_mixture({"a": 0, "b": 0}, plans, seq_len=8, global_batch_size=2)
    assert mixture.stages == (Stage(0, shares([0, 1])), Stage(10, shares([1, 0])))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (StagePlan(weights={"a": 1}), "data.stages[1] must have either from_step or from_tokens, but has neither"),
        (
            StagePlan(from_step=9, from_tokens=9, weights={"a": 1}),
            "data.stages[1] must have either from_step or from_tokens, but has both",
        ),
        (StagePlan(from_step=-1, weights={"a": 1}), "data.stages[1].from_step must be at least 0 and within"),
        (StagePlan(from_tokens=-1, weights={"a": 1}), "data.stages[1].from_tokens must be at least 0 and within"),
        (StagePlan(from_step=2**62, weights={"a": 1}), "data.stages[1].from_step must be at least 0 and within"),
        (
            StagePlan(from_step=5, weights={"a": 1}),
            "data.stages[1] must begin at a later step than the stage before it (step 5), but begins at step 5",
        ),
        (StagePlan(from_step=0, weights={"a": 1}), "data.stages[1] must begin at a later step"),
        (StagePlan(from_tokens=33, weights={"a": 1}), "data.stages[1] must begin at a later step"),
        (StagePlan(from_step=9, weights={}), "data.stages[1].weights must name at least one source"),
        (StagePlan(from_step=9, weights={"c": 1}), "data.stages[1].weights.c must be one of data.sources (a, b)"),
        (StagePlan(from_step=9, weights={"a": 0, "b": 0}), "data.stages[1].weights.a, data.stages[1].weights.b must"),
        (StagePlan(from_step=9, weights={"b": "x"}), "data.stages[1].weights.b must be 0, or a number"),
        (StagePlan(from_step=9, weights={"a": 1e-9, "b": 1}), "data.stages[1].weights.a must be so round"),
    ],
)
def test_a_stage_that_cannot_be_is_refused_by_its_field(plan: StagePlan, message: str) -> None:
    first = StagePlan(from_step=5, weights={"a": 1})
    with pytest.raises(DataError, match=re.escape(message)):
        as_mixture({"a": 0.5, "b": 0.5}, [first, plan], seq_len=4, global_batch_size=2)


# Weights that change in the middle of a run


@settings(max_examples=40, deadline=None)
@given(old=mixtures(sources=3), new=mixtures(sources=3), at=st.integers(0, 150))
def test_what_was_read_stays_as_it_was_and_the_new_weights_hold_from_there(
    old: Mixture, new: Mixture, at: int
) -> None:
    mixture = continued(old, new, at)
    assert located(mixture, 0, at) == located(old, 0, at)
    for first, last in itertools.pairwise([at, *(s.first_sample for s in new.stages if s.first_sample > at), 200]):
        weights = new.stages[new.stage_at(first)].weights
        assert all(s.weights == weights for s in mixture.stages if first <= s.first_sample < last)
        assert mixture.stages[mixture.stage_at(first)].weights == weights
    # Each source goes on with its next sample.
    read = located(mixture, 0, 200)
    for source in range(3):
        numbers = [number for s, number in read if s == source]
        assert numbers == list(range(len(numbers)))


@settings(max_examples=50, deadline=None)
@given(mixture=mixtures(), at=st.integers(0, 150))
def test_going_on_with_the_same_weights_changes_nothing(mixture: Mixture, at: int) -> None:
    assert continued(mixture, mixture, at) == mixture


def test_sources_come_and_go() -> None:
    old = as_mixture({"web": 0.5, "code": 0.5}, seq_len=8, global_batch_size=1)
    new = as_mixture({"chat": 0.75, "code": 0.25}, seq_len=8, global_batch_size=1)
    mixture = continued(old, new, 101)
    assert mixture.names == ("web", "code", "chat")
    assert located(mixture, 0, 101) == located(old, 0, 101)
    assert mixture.counts(101 + 400).tolist() == [51, 50 + 100, 300]


def test_weights_may_change_again() -> None:
    first, second, third = three((0, [7, 2, 1])), three((0, [1, 1, 1])), three((0, [0, 0, 1]), (90, [1, 0, 0]))
    mixture = continued(continued(first, second, 33), third, 70)
    assert [s.first_sample for s in mixture.stages] == [0, 33, 70, 90]
    assert located(mixture, 0, 33) == located(first, 0, 33)
    assert [s for s, _ in located(mixture, 70, 95)] == [2] * 20 + [0] * 5
    # Back before the second change, and on by other weights.
    back = continued(mixture, second, 50)
    assert located(back, 0, 70) == located(mixture, 0, 70)
    assert [s.first_sample for s in back.stages] == [0, 33]
