"""Thinning a curve: what must not be lost."""

import math

from hypothesis import given
from hypothesis import strategies as st

from regrow.trainer.report.thin import thin

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)


@given(st.lists(NUMBERS, max_size=300), st.integers(4, 60))
def test_the_ends_and_the_extremes_are_kept(values: list[float], points: int) -> None:
    kept = thin(values, points)
    assert kept == sorted(set(kept))
    assert len(kept) <= max(points, 0) or len(values) <= points
    if values:
        assert {kept[0], kept[-1]} == {0, len(values) - 1}
        assert min(values) in [values[k] for k in kept]
        assert max(values) in [values[k] for k in kept]


def test_a_short_curve_stays_as_it_is() -> None:
    assert thin([3.0, 1.0, 2.0], 4) == [0, 1, 2]
    assert thin([], 4) == []


def test_each_stretch_keeps_its_own_extremes() -> None:
    values = [math.sin(n / 5) for n in range(1000)]
    kept = thin(values, 102)
    for piece in range(50):
        low, high = 1 + piece * 998 // 50, 1 + (piece + 1) * 998 // 50
        part = [values[k] for k in kept if low <= k < high]
        assert (min(part), max(part)) == (min(values[low:high]), max(values[low:high]))
