"""Every schedule reaches its peak, never rises after it, ends at the floor and stays there, however long it is."""

import itertools

import hypothesis.strategies as st
import pytest
from hypothesis import example, given

from regrow.trainer.schedules.base import Schedule
from regrow.trainer.schedules.config import CosineConfig, LinearConfig, WSDConfig
from regrow.trainer.schedules.shapes import Cosine, Linear, WarmupStableDecay

KINDS = ["wsd", "cosine", "linear"]


def made(kind: str, warmup: int, floor: float, decay: float = 0.2) -> Schedule:
    if kind == "wsd":
        return WarmupStableDecay(WSDConfig(warmup_steps=warmup, min_lr_ratio=floor, decay_ratio=decay))
    if kind == "cosine":
        return Cosine(CosineConfig(warmup_steps=warmup, min_lr_ratio=floor))
    return Linear(LinearConfig(warmup_steps=warmup, min_lr_ratio=floor))


@pytest.mark.parametrize("kind", KINDS)
@given(
    warmup=st.integers(0, 400),
    total=st.integers(1, 400),
    floor=st.floats(0, 1),
    decay=st.floats(0, 1, exclude_min=True),
)
@example(warmup=100, total=20, floor=0.1, decay=0.2)
@example(warmup=100, total=110, floor=0.1, decay=0.2)
@example(warmup=0, total=2, floor=0.1, decay=1.0)
@example(warmup=5, total=100, floor=0.0, decay=0.001)
def test_it_rises_to_its_peak_falls_to_its_floor_and_stays(
    kind: str, warmup: int, total: int, floor: float, decay: float
) -> None:
    schedule = made(kind, warmup, floor, decay)
    values = [schedule.factor(step, total) for step in range(1, total + 20)]
    peak = values.index(max(values))
    assert values[peak] == 1.0
    rising, falling = values[: peak + 1], values[peak:]
    assert all(a < b for a, b in itertools.pairwise(rising))
    assert all(a >= b for a, b in itertools.pairwise(falling))
    if total > 1:
        assert values[total - 1] == pytest.approx(floor, abs=1e-12)
    assert len(set(values[total:])) == 1
    assert values[-1] == pytest.approx(floor, abs=1e-12)
    assert all(0 <= v <= 1 for v in values)


@pytest.mark.parametrize("kind", KINDS)
@given(warmup=st.integers(0, 300), total=st.integers(1, 300))
def test_a_warm_up_that_fits_is_kept_and_another_is_said(kind: str, warmup: int, total: int) -> None:
    schedule = made(kind, warmup, 0.1, decay=0.2)
    said = schedule.shortened(total)
    if warmup < total:
        assert schedule.factor(max(1, warmup), total) == 1.0
        assert all(schedule.factor(s, total) == s / warmup for s in range(1, warmup))
    elif warmup > 1:
        assert said is not None
        assert f"warmup_steps ({warmup}) does not fit into a schedule of {total} steps" in said
    if kind != "wsd":
        assert (said is None) == (warmup < total or warmup <= 1)


def test_a_decay_that_gives_way_is_said() -> None:
    assert made("wsd", 80, 0.1).shortened(100) is None
    assert made("wsd", 0, 0.1, decay=1.0).shortened(100) is None
    said = made("wsd", 90, 0.1).shortened(100)
    assert said is not None
    assert "overlap in a schedule of 100 steps: the decay takes the last 10 of them" in said
    assert [made("wsd", 90, 0.1).factor(s, 100) for s in (89, 90, 95)] == pytest.approx([89 / 90, 1.0, 0.55])


def test_without_a_decay_the_rate_stays() -> None:
    schedule = made("wsd", 10, 0.1, decay=0.0)
    assert {schedule.factor(s, 100) for s in range(10, 200)} == {1.0}
    assert schedule.shortened(100) is None
