"""What becomes a sentence, and what stays an error."""

from pathlib import Path

import pytest

from regrow.checkpoint.documents import DocumentError
from regrow.checkpoint.errors import CheckpointError, StepNotFoundError
from regrow.errors import ConfigError
from regrow.launch.config.errors import UserError, describe, naming_fields
from regrow.launch.config.refusals import Refused, refusing
from regrow.trainer.data.source import DataError
from regrow.trainer.run_record import RunRecordError
from tests.support import compose_config

SENTENCE = "a.b must be 1, but is 2; use 1"


@pytest.mark.parametrize("kind", [ConfigError, UserError, CheckpointError, DataError, RunRecordError, DocumentError])
def test_what_a_user_can_cause_is_its_sentence(kind: type[Exception]) -> None:
    with pytest.raises(Refused, match=f"^{SENTENCE}$"), refusing():
        raise kind(SENTENCE)


@pytest.mark.parametrize("kind", [ValueError, TypeError, KeyError, RuntimeError])
def test_a_bug_stays_what_it_is(kind: type[Exception]) -> None:
    with pytest.raises(kind) as raised, refusing():
        raise kind("a bug")
    assert not isinstance(raised.value, Refused)
    assert describe(raised.value) is None


def handle_badly() -> None:
    try:
        raise CheckpointError(SENTENCE)
    except CheckpointError:
        print(1 / 0)


def test_a_bug_met_while_an_explained_error_is_handled_is_not_explained_by_it() -> None:
    with pytest.raises(ZeroDivisionError), refusing():
        handle_badly()


def test_the_operating_systems_refusal_names_path_and_field(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    with pytest.raises(Refused) as refused, refusing():
        gone.read_bytes()
    assert str(refused.value) == f"{gone}: No such file or directory; check that it is there and may be used"
    with (
        pytest.raises(Refused) as named,
        refusing(),
        naming_fields(("run.root", tmp_path / "x"), ("data.files", gone)),
    ):
        gone.read_bytes()
    assert str(named.value).startswith(f"data.files must be files that can be read, but {gone} cannot")
    # One of ours has no number, and its message is all.
    with pytest.raises(Refused, match=r"^checkpoint.load_step must be one of the steps in f"), refusing():
        raise StepNotFoundError(5, [1], "f")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.stps=3", "did you mean train.steps"),
        ("train.steps=abc", "train.steps must be a whole number, but is 'abc'"),
        ("model=llama9", "model must be one of"),
    ],
)
def test_what_cannot_be_composed_is_a_sentence(override: str, sentence: str) -> None:
    with pytest.raises(Refused, match=sentence), refusing():
        compose_config([override])
