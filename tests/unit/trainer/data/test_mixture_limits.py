"""How long sources last: refused with the arithmetic, or left out from the sample after their last one on."""

import math
import re
from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from regrow.trainer.data.mixture import Mixture, Stage, StagePlan, as_mixture, continued
from regrow.trainer.data.mixture_limits import Supply, limited, use_of
from regrow.trainer.data.source import DataError

Limits = list[int | None]


def supplies(mixture: Mixture, limits: Limits) -> dict[str, Supply]:
    """Sources that may give so many samples."""
    return {
        name: Supply(windows=7, max_epochs=None) if limit is None else Supply(windows=limit, max_epochs=1)
        for name, limit in zip(mixture.names, limits, strict=True)
    }


def reweighted(mixture: Mixture, limits: Limits, samples: int, settled: int = 0) -> Mixture:
    return limited(
        mixture,
        supplies(mixture, limits),
        samples=samples,
        global_batch_size=10,
        on_exhausted="reweight",
        settled=settled,
    )


def sources_of(mixture: Mixture, samples: int) -> list[int]:
    return mixture.locate(np.arange(samples))[0].tolist()  # type: ignore[no-any-return]


def walk(mixture: Mixture, limits: Limits, samples: int) -> list[int] | None:
    """The source of each sample, found one after another; None: there is none left for one of them."""
    total = [0] * len(mixture.names)
    taken, place, weights, stage = list(total), 0, [Fraction(0)] * len(total), None
    found = []
    for position in range(samples):
        now = mixture.stages[mixture.stage_at(position)]
        left = [
            w if limit is None or count < limit else Fraction(0)
            for w, limit, count in zip(now.weights, limits, total, strict=True)
        ]
        if not any(left):
            return None
        scaled = [w / sum(left) for w in left]
        if now is not stage or scaled != weights:
            taken, place, weights, stage = [0] * len(total), 0, scaled, now
        _, source = min(
            (math.ceil((k + 1) / w), s)
            for s, (w, k) in enumerate(zip(weights, taken, strict=True))
            if w > 0 and math.floor(k / w) <= place
        )
        found.append(source)
        total[source] += 1
        taken[source] += 1
        place += 1
    return found


def parts_of(sources: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, 9), min_size=sources, max_size=sources).filter(any)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Mixture, Limits]:
    """Up to three stages over up to four sources, each with an end or none."""
    count = draw(st.integers(1, 4))
    firsts = sorted(draw(st.sets(st.integers(1, 80), max_size=2)) | {0})
    parts = [draw(parts_of(count)) for _ in firsts]
    stages = [Stage(f, tuple(Fraction(p, sum(ps)) for p in ps)) for f, ps in zip(firsts, parts, strict=True)]
    limits = draw(st.lists(st.none() | st.integers(1, 60), min_size=count, max_size=count))
    return Mixture(tuple("abcd"[:count]), tuple(stages)), limits


@settings(max_examples=80, deadline=None)
@given(case=cases(), samples=st.integers(1, 160))
def test_a_source_that_is_used_up_is_left_out_as_a_walk_leaves_it_out(
    case: tuple[Mixture, Limits], samples: int
) -> None:
    mixture, limits = case
    walked = walk(mixture, limits, samples)
    if walked is None:
        with pytest.raises(DataError, match=re.escape("data.sources.*.max_epochs must leave a source for each of")):
            reweighted(mixture, limits, samples)
    else:
        assert sources_of(reweighted(mixture, limits, samples), samples) == walked


@settings(max_examples=40, deadline=None)
@given(case=cases(), samples=st.integers(1, 120), more=st.integers(1, 60))
def test_a_run_may_be_lengthened(case: tuple[Mixture, Limits], samples: int, more: int) -> None:
    mixture, limits = case
    try:
        longer = reweighted(mixture, limits, samples + more)
    except DataError:
        return
    assert sources_of(reweighted(mixture, limits, samples), samples) == sources_of(longer, samples)


@settings(max_examples=40, deadline=None)
@given(old=cases(), new=cases(), at=st.integers(0, 100))
def test_limits_after_a_change_leave_alone_what_was_read(
    old: tuple[Mixture, Limits], new: tuple[Mixture, Limits], at: int
) -> None:
    try:
        before = reweighted(*old, samples=max(at, 1))
    except DataError:
        return
    mixture = continued(before, new[0], at)
    limits = [*new[1], *[None] * 4][: len(mixture.names)]
    try:
        after = reweighted(mixture, limits, samples=200, settled=at)
    except DataError:
        return
    assert sources_of(after, at) == sources_of(before, at)
    had, has = after.counts(at).tolist(), after.counts(200).tolist()
    for limit, count, total in zip(limits, had, has, strict=True):
        assert limit is None or total <= max(limit, count)


def test_the_others_keep_their_ratios_from_the_sample_after_the_last_one() -> None:
    mixture = as_mixture({"web": 0.6, "code": 0.3, "books": 0.1}, seq_len=8, global_batch_size=10)
    limits: Limits = [None, None, 5]
    result = reweighted(mixture, limits, samples=1000)
    end = result.stages[1].first_sample
    assert mixture.position_of(2, 4) == end - 1
    assert result.stages[0] == mixture.stages[0]
    assert result.stages[1:] == (Stage(end, (Fraction(2, 3), Fraction(1, 3), Fraction(0))),)
    assert result.counts(10**12)[2] == 5


def test_nothing_is_changed_where_nothing_is_used_up() -> None:
    mixture = as_mixture({"web": 0.6, "code": 0.4}, seq_len=8, global_batch_size=10)
    for on_exhausted in ("refuse", "reweight"):
        for limit in (None, 40):
            result = limited(
                mixture,
                supplies(mixture, [None, limit]),
                samples=100,
                global_batch_size=10,
                on_exhausted=on_exhausted,
            )
            assert result is mixture


def refused(mixture: Mixture, given_supplies: dict[str, Supply], samples: int, on_exhausted: str = "refuse") -> str:
    with pytest.raises(DataError) as error:
        limited(
            mixture,
            given_supplies,
            samples=samples,
            global_batch_size=12,
            on_exhausted=on_exhausted,  # type: ignore[arg-type]
        )
    return str(error.value)


def test_a_source_that_is_used_up_is_refused_with_the_arithmetic() -> None:
    mixture = as_mixture({"web": 0.7, "code": 0.2, "books": 0.1}, seq_len=8, global_batch_size=12)
    message = refused(
        mixture,
        {
            "web": Supply(windows=9000),
            "code": Supply(windows=1000, max_epochs=2),
            "books": Supply(windows=1100, max_epochs=1),
        },
        12_000,
    )
    # One sample in five is code's: 10,000 of 12,000 samples can be served, 833 whole steps of 12.
    assert message == (
        "data.sources.code.max_epochs must cover the run, but is 2: 1,000 steps take 2,400 samples of code, which has "
        "1,000 windows and may give 2,000, enough for 833 steps (books would be used up later); use "
        "data.sources.code.max_epochs=3, a lower weight, train.steps=833 or data.on_exhausted=reweight"
    )


@settings(max_examples=40, deadline=None)
@given(case=cases(), samples=st.integers(1, 160))
def test_what_is_refused_says_how_many_steps_there_would_be(case: tuple[Mixture, Limits], samples: int) -> None:
    mixture, limits = case
    wanted = mixture.counts(samples).tolist()
    over = [i for i, limit in enumerate(limits) if limit is not None and wanted[i] > limit]
    if not over:
        return
    message = refused(mixture, supplies(mixture, limits), samples)
    found = re.search(r"enough for (\d+) steps", message)
    assert found is not None
    for steps, fits in ((int(found[1]), True), (int(found[1]) + 1, False)):
        taken = mixture.counts(steps * 12).tolist()
        assert all(limit is None or k <= limit for k, limit in zip(taken, limits, strict=True)) is fits


def test_a_run_for_which_all_sources_are_too_short_is_refused() -> None:
    mixture = as_mixture({"web": 0.5, "code": 0.5}, seq_len=8, global_batch_size=12)
    given_supplies = {"web": Supply(windows=30, max_epochs=1), "code": Supply(windows=20, max_epochs=1.5)}
    message = refused(mixture, given_supplies, 120, "reweight")
    assert message == (
        "data.sources.*.max_epochs must leave a source for each of 120 samples (10 steps), but after 60 (5 steps) "
        "code is used up as the last one; use more epochs, train.steps=5 or another source"
    )
    plan = StagePlan(from_step=8, weights={"web": 1})
    staged = as_mixture({"web": 0.5, "code": 0.5}, [plan], seq_len=8, global_batch_size=12)
    given_supplies["code"] = Supply(windows=1)
    assert "but after 96 (8 steps) web is used up as the last one" in refused(staged, given_supplies, 120, "reweight")


@pytest.mark.parametrize("on_exhausted", ["refuse", "reweight"])
@pytest.mark.parametrize(
    ("supply", "message"),
    [
        (Supply(windows=0), "data.sources.b must hold a whole window of data.seq_len tokens"),
        (Supply(windows=5, max_epochs=-1), "data.sources.b.max_epochs must be at least 0, but is -1"),
        (Supply(windows=5, max_epochs=math.nan), "data.sources.b.max_epochs must be at least 0, but is nan"),
        (Supply(windows=5, max_epochs=math.inf), "data.sources.b.max_epochs must be at least 0, but is inf"),
        (Supply(windows=5, max_epochs=0.1), "data.sources.b.max_epochs must allow at least one of the 5 windows"),
    ],
)
def test_a_source_that_has_nothing_to_give_is_refused_where_it_is_used(
    supply: Supply, message: str, on_exhausted: str
) -> None:
    used = as_mixture({"a": 0.5, "b": 0.5}, seq_len=8, global_batch_size=12)
    assert message in refused(used, {"a": Supply(windows=9), "b": supply}, 10, on_exhausted)
    later = [StagePlan(from_step=5, weights={"b": 1})]
    unused = as_mixture({"a": 1, "b": 0}, later, seq_len=8, global_batch_size=12)
    result = limited(
        unused,
        {"a": Supply(windows=9), "b": supply},
        samples=60,
        global_batch_size=12,
        on_exhausted=on_exhausted,  # type: ignore[arg-type]
    )
    assert result == unused


def test_parts_of_epochs_are_counted_in_whole_windows() -> None:
    assert Supply(windows=10, max_epochs=0.3).limit == 3
    assert Supply(windows=7, max_epochs=1.5).limit == 10
    assert Supply(windows=10**15, max_epochs=3).limit == 3 * 10**15
    assert Supply(windows=10, max_epochs=0).limit is Supply(windows=10).limit is None


@settings(max_examples=40, deadline=None)
@given(case=cases(), samples=st.integers(1, 160))
def test_what_a_run_takes_adds_up(case: tuple[Mixture, Limits], samples: int) -> None:
    mixture, _ = case
    windows = {name: 10 * (i + 1) for i, name in enumerate(mixture.names)}
    rows = use_of(mixture, samples, windows, seq_len=8)
    assert sum(row.samples for row in rows) == samples
    sources = sources_of(mixture, samples)
    for row in rows:
        index = mixture.names.index(row.source)
        assert row.weight == mixture.stages[row.stage].weights[index] > 0
        assert row.samples == sources[row.first_sample : row.last_sample].count(index)
        assert row.tokens == 8 * row.samples
        assert row.epochs == row.samples / windows[row.source]
        assert row.epochs_so_far == sources[: row.last_sample].count(index) / windows[row.source]


def test_what_a_run_of_a_trillion_samples_takes_is_exact() -> None:
    plans = [StagePlan(from_step=5 * 10**11, weights={"code": 1})]
    mixture = as_mixture({"web": 0.7, "code": 0.3}, plans, seq_len=4096, global_batch_size=1)
    rows = use_of(mixture, 10**12, {"web": 10**9, "code": 0}, seq_len=4096)
    assert [(r.stage, r.source, r.samples, r.tokens) for r in rows] == [
        (0, "web", 35 * 10**10, 35 * 10**10 * 4096),
        (0, "code", 15 * 10**10, 15 * 10**10 * 4096),
        (1, "code", 5 * 10**11, 5 * 10**11 * 4096),
    ]
    assert [r.epochs for r in rows] == [350.0, math.inf, math.inf]
