"""Which measured value is best."""

import math

from hypothesis import given
from hypothesis import strategies as st

from regrow.checkpoint.policy.best import BestMetric

METRICS = st.lists(st.one_of(st.none(), st.floats(allow_nan=True)), max_size=20)


@given(METRICS, st.booleans())
def test_the_best_step_is_the_first_that_no_other_beats(values: list[float | None], lower: bool) -> None:
    best = BestMetric(metric="loss", lower_is_better=lower)
    found = best.best_step((n, {} if v is None else {"loss": v}) for n, v in enumerate(values))
    measured = [v for v in values if v is not None and not math.isnan(v)]
    if found is None:
        assert not measured
    else:
        assert values.index(min(measured) if lower else max(measured)) == found


@given(st.floats(allow_nan=True), st.booleans())
def test_nothing_and_nan_never_improve(value: float, lower: bool) -> None:
    best = BestMetric(lower_is_better=lower)
    assert not best.improves(None, value)
    assert not best.improves(math.nan, value)
    assert best.improves(value, None) is not math.isnan(value)
    assert not best.improves(value, value)
