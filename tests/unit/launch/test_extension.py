"""What `run.extend` decides, without a run."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from regrow.launch.config.errors import UserError
from regrow.launch.run.extension import Span, decide_extension
from regrow.trainer.run_record import Extend, Extension


def decide(span: Span, steps: int, mode: Extend = Extend.refuse, *known: Extension, explicit: bool = False) -> object:
    return decide_extension(span, steps, mode, known, lineage="0-a", explicit=explicit)


spans = st.builds(Span, origin=st.integers(0, 500), total=st.integers(1, 5000), step=st.integers(0, 400))


@given(span=spans, steps=st.integers(1, 8000))
def test_only_a_hundredth_or_one_step_goes_beyond_the_end_unasked(span: Span, steps: int) -> None:
    if 100 * (steps - span.end) > max(100, span.total):
        with pytest.raises(UserError) as caught:
            decide(span, steps)
        for words in (
            f"at most {span.end}",
            f"is {steps}",
            "run.extend=stretch",
            "run.extend=hold",
            "run.resume=never",
        ):
            assert words in str(caught.value)
    else:
        assert decide(span, steps) is None
    assert decide(span, steps, explicit=True) is None


@given(span=spans, steps=st.integers(1, 8000), mode=st.sampled_from([Extend.stretch, Extend.hold]))
def test_an_answer_acts_once(span: Span, steps: int, mode: Extend) -> None:
    first = decide(span, steps, mode)
    if steps <= span.end:
        assert first is None
        return
    assert isinstance(first, Extension)
    assert first.total == (steps - span.origin if mode is Extend.stretch else span.total)
    now = Span(origin=span.origin, total=first.total, step=span.step)
    # The same command, one without the answer, and a requeue of either.
    assert decide(now, steps, mode, first) is None
    assert decide(now, steps, Extend.refuse, first) is None
    assert decide(now, steps - 1, Extend.refuse, first) is None
    # More steps than the answer was for are asked about again.
    far = steps + now.total + 2
    with pytest.raises(UserError, match="train.steps must be at most"):
        decide(now, far, Extend.refuse, first)


def test_a_schedule_of_given_length_is_stretched_by_its_own_field() -> None:
    with pytest.raises(
        UserError, match=r"use scheduler.total_steps=1000 and run.allow_change=\[scheduler.total_steps\]"
    ):
        decide(Span(origin=0, total=20), 1000, Extend.stretch, explicit=True)
