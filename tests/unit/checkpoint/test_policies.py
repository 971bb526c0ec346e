"""Save policies, retention rules and lineages, as pure decisions."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from regrow.checkpoint.config import (
    BestMetricConfig,
    CheckpointConfig,
    KeepBestConfig,
    KeepEveryNConfig,
    MinutesConfig,
    OnBestConfig,
)
from regrow.checkpoint.errors import CheckpointError, StepNotFoundError
from regrow.checkpoint.policy.lineage import (
    Lineage,
    LoadRequest,
    Resume,
    StartKind,
    choose_lineage,
    is_visible,
    start_point,
)
from regrow.checkpoint.policy.retention import KeepBest, KeepEveryN, KeepLatest, RetainableStep, removable_steps
from regrow.checkpoint.policy.save import (
    EveryMinutes,
    EveryNSteps,
    FirstStep,
    LastStep,
    OnBest,
    OnStop,
    SaveContext,
    save_reasons,
)


def test_policies_combine_with_any() -> None:
    policies = [EveryNSteps(10), FirstStep(), LastStep(), OnStop(), EveryMinutes(MinutesConfig(minutes=1))]

    def reasons(**context: object) -> list[str]:
        return save_reasons(policies, SaveContext(last_step=45, **context))  # type: ignore[arg-type]

    assert reasons(step=7) == []
    assert reasons(step=1) == ["first step"]
    assert reasons(step=10) == ["every 10 steps"]
    assert reasons(step=45) == ["last step"]
    assert reasons(step=46) == ["last step"]
    assert reasons(step=7, stopping=True) == ["stop requested"]
    assert reasons(step=7, seconds_since_save=60.0) == ["every 1 minutes"]
    assert reasons(step=20, stopping=True) == ["every 10 steps", "stop requested"]


@pytest.mark.parametrize(
    ("value", "best", "lower", "due"),
    [(1.0, None, True, True), (1.0, 2.0, True, True), (2.0, 1.0, True, False), (2.0, 1.0, False, True),
     (float("nan"), None, True, False), (1.0, 1.0, True, False)],
)  # fmt: skip
def test_a_new_best_saves(value: float, best: float | None, lower: bool, due: bool) -> None:
    policy = OnBest(OnBestConfig(best=BestMetricConfig(lower_is_better=lower)))
    known = {} if best is None else {"val_loss": best}
    assert policy.due(SaveContext(step=1, last_step=9, metrics={"val_loss": value}, best=known)) is due
    assert not policy.due(SaveContext(step=1, last_step=9, best=known))


STEPS = st.lists(
    st.builds(
        RetainableStep,
        step=st.integers(1, 200),
        pinned=st.booleans(),
        metrics=st.dictionaries(st.just("val_loss"), st.floats(allow_nan=True)),
    ),
    unique_by=lambda s: s.step,
)


@given(steps=STEPS, k=st.integers(0, 5), n=st.integers(1, 50))
def test_retention_never_removes_what_must_stay(steps: list[RetainableStep], k: int, n: int) -> None:
    removed = removable_steps([KeepLatest(k), KeepEveryN(KeepEveryNConfig(n=n)), KeepBest(KeepBestConfig())], steps)
    kept = {s.step for s in steps} - set(removed)
    newest = sorted(s.step for s in steps)
    assert removed == sorted(removed)
    assert set(newest[-max(k, 1) :]) <= kept
    assert {s.step for s in steps if s.pinned or s.step % n == 0} <= kept
    measured = [s for s in steps if s.metrics and s.metrics["val_loss"] == s.metrics["val_loss"]]
    if measured:
        assert min(measured, key=lambda s: (s.metrics["val_loss"], s.step)).step in kept
    if k == 0:
        assert not removed


def test_keep_latest_removes_the_older_ones() -> None:
    steps = [RetainableStep(step=s) for s in (10, 20, 30, 40)]
    assert removable_steps([KeepLatest(2)], steps) == [10, 20]
    assert removable_steps([KeepLatest(1)], steps) == [10, 20, 30]
    assert removable_steps([], []) == []


def choose(
    lineages: list[Lineage],
    request: LoadRequest,
    steps: list[int],
    *,
    rewind: bool = False,
    resume: Resume = Resume.auto,
) -> Lineage | None:
    return choose_lineage(
        lineages, request, steps=steps, resume=resume, rewind=rewind, new_id="new", folder="run/checkpoint"
    )


FIRST = Lineage(id="a")
BACK = LoadRequest(load_step=20)


def test_a_first_command_starts_a_fresh_lineage() -> None:
    lineage = choose([], LoadRequest(), [])
    assert lineage is not None
    assert lineage.origin is StartKind.fresh


def test_the_same_command_continues() -> None:
    assert choose([FIRST], LoadRequest(), [10, 20]) is None


def test_load_step_starts_a_lineage_once() -> None:
    lineage = choose([FIRST], BACK, [10, 20, 30])
    assert lineage == Lineage(id="new", origin=StartKind.step, origin_step=20, parent="a", request=BACK)
    assert choose([FIRST, lineage], BACK, [10, 20, 25]) is None
    assert choose([FIRST, lineage], LoadRequest(), [10, 20, 25]) is None
    assert choose([FIRST, lineage], LoadRequest(load_step=10), [10, 20, 25]) is not None


def test_rewind_applies_it_again() -> None:
    second = Lineage(id="b", origin=StartKind.step, origin_step=20, parent="a", request=BACK)
    again = choose([FIRST, second], BACK, [10, 20, 25], rewind=True)
    assert again is not None
    assert (again.origin_step, again.parent) == (20, "b")


def test_excluding_alone_starts_from_the_newest_step_once() -> None:
    request = LoadRequest(exclude=("optimizer",))
    lineage = choose([FIRST], request, [10, 20])
    assert lineage is not None
    assert lineage.origin_step == 20
    assert start_point([FIRST, lineage], [(10, "a"), (20, "a")]).exclude == ("optimizer",)
    later = start_point([FIRST, lineage], [(10, "a"), (20, "a"), (25, "new")])
    assert (later.step, later.exclude) == (25, ())


def test_a_missing_step_is_refused_with_those_that_are_there() -> None:
    with pytest.raises(StepNotFoundError, match=r"\(10, 30\), but is 20"):
        choose([FIRST], BACK, [10, 30])


def test_must_with_nothing_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"run\.resume must not be 'must'"):
        choose([], LoadRequest(), [], resume=Resume.must)
    assert choose([FIRST], LoadRequest(), [5], resume=Resume.must) is None


def test_never_starts_afresh() -> None:
    lineage = choose([FIRST], LoadRequest(), [10], resume=Resume.never)
    assert lineage is not None
    assert lineage.origin is StartKind.fresh
    assert start_point([FIRST, lineage], []).kind is StartKind.fresh


def test_initial_load_is_where_a_lineage_starts_until_it_has_a_step() -> None:
    request = LoadRequest(initial_load_path="x", exclude=())
    lineage = choose([], request, [])
    assert lineage is not None
    assert start_point([lineage], []).kind is StartKind.initial
    assert start_point([lineage], [(3, "new")]).kind is StartKind.step


def test_visibility_follows_descent() -> None:
    line = [
        Lineage(id="a"),
        Lineage(id="b", origin=StartKind.step, origin_step=30, parent="a"),
        Lineage(id="c", origin=StartKind.step, origin_step=20, parent="b"),
    ]
    assert is_visible(line, 20, "a")
    assert not is_visible(line, 30, "a")
    assert not is_visible(line, 40, "b")
    assert is_visible(line, 99, "c")
    assert is_visible(line[:2], 30, "a")
    assert not is_visible(line[:2], 40, "a")
    assert not is_visible([], 1, "a")


@given(st.data())
def test_a_start_never_loads_a_step_outside_its_line(data: st.DataObject) -> None:
    """Random commands over random histories: what is loaded is visible, and repeating a command continues."""
    lineages: list[Lineage] = []
    stored: dict[int, str] = {}
    for turn in range(data.draw(st.integers(1, 6))):
        visible = [s for s in sorted(stored) if is_visible(lineages, s, stored[s])]
        step = data.draw(st.sampled_from([-1, *visible]))
        request = LoadRequest(load_step=step)
        new = choose_lineage(
            lineages, request, steps=visible, resume=Resume.auto, rewind=False, new_id=str(turn), folder="f"
        )
        if new is not None:
            lineages.append(new)
        visible = [s for s in sorted(stored) if is_visible(lineages, s, stored[s])]
        start = start_point(lineages, [(s, stored[s]) for s in visible])
        assert start.kind is StartKind.fresh or start.step in visible
        if new is not None and step >= 0:
            assert start.step == step
        stored = {s: stored[s] for s in visible}
        begin = start.step
        for s in range(begin + 1, begin + 1 + data.draw(st.integers(0, 3))):
            stored[s] = lineages[-1].id
        assert (
            choose_lineage(
                lineages, request, steps=sorted(stored), resume=Resume.auto, rewind=False, new_id="x", folder="f"
            )
            is None
            or request.is_default is False
        )


def test_excluded_names_have_one_spelling() -> None:
    config = CheckpointConfig(exclude_from_loading=["dataloader", "optimizer"])
    assert LoadRequest.from_config(config).exclude == ("data_loader", "optimizer")
    with pytest.raises(ValueError, match="holds 'optimiser'"):
        LoadRequest.from_config(CheckpointConfig(exclude_from_loading=["optimiser"]))
