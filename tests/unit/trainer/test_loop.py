"""The loop's text, and what a hook may be called."""

from pathlib import Path

import pytest

import regrow.trainer.loop
from regrow.trainer.hook import Hook
from regrow.trainer.state import TrainState
from tests.support import REPO


def test_the_documentation_has_the_loops_own_text() -> None:
    docstring = regrow.trainer.loop.__doc__
    assert docstring is not None
    _, text = docstring.split("\n\n", 1)
    assert f"```\n{text.rstrip()}\n```" in (REPO / "docs/loop.md").read_text()


def test_the_loops_text_has_every_event_in_the_order_of_the_class() -> None:
    docstring = regrow.trainer.loop.__doc__
    assert docstring is not None
    events = [name for name in vars(Hook) if not name.startswith("_")]
    assert len(events) == 12
    for event in events:
        assert f"{event} " in docstring or f"{event}(" in docstring or f"{event}\n" in docstring, event
    in_file = [line.split("(")[0].split()[1] for line in source().splitlines() if line.startswith("    def ")]
    assert [name for name in in_file if not name.startswith("_")] == events


def source() -> str:
    return Path(REPO / "trainer/hook.py").read_text()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("step_end", "which is after_step now"),
        ("on_committed", "which is after_commit now"),
        ("before_optimiser_step", "must be one of the events"),
        ("after_validation", "must be one of the events"),
    ],
)
def test_what_would_never_be_called_is_refused(name: str, told: str) -> None:
    with pytest.raises(TypeError, match=told):
        type("MineHook", (Hook,), {name: lambda self, trainer: None})


def test_a_hook_may_have_methods_of_its_own() -> None:
    kind: type[Hook] = type("MineHook", (Hook,), {"measure": lambda self: 3, "_after": lambda self: None})
    assert isinstance(kind(), Hook)


def test_the_best_value_is_remembered_and_never_one_that_is_no_number() -> None:
    state = TrainState()
    for value in (3.0, float("nan"), None, 2.0, 4.0):
        state.note_best("val_loss", value, lower_is_better=True)
        state.note_best("accuracy", value, lower_is_better=False)
    assert state.best == {"val_loss": 2.0, "accuracy": 4.0}
