"""The four ways in which a command ends."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regrow.launch.exit_code import ExitCode, gravest
from regrow.launch.run.rank_spec import OUTCOME, Outcome, read_outcome, write_outcome

CODES = st.sampled_from(ExitCode)


def test_the_numbers_are_those_that_scripts_know() -> None:
    assert {code.name: int(code) for code in ExitCode} == {"done": 0, "failed": 1, "bad_input": 2, "resumable": 3}


@given(st.lists(CODES))
def test_the_gravest_is_one_of_them_and_no_order_or_repetition_changes_it(codes: list[ExitCode]) -> None:
    worst = gravest(codes)
    assert worst in codes or (not codes and worst is ExitCode.done)
    assert gravest([*reversed(codes), *codes]) is worst
    assert gravest([*codes, ExitCode.done]) is worst
    assert gravest([*codes, ExitCode.failed]) is ExitCode.failed


def test_a_sweep_is_resumable_only_where_nothing_is_wrong() -> None:
    assert gravest([0, 3, 0]) is ExitCode.resumable
    assert gravest([3, 2]) is ExitCode.bad_input
    with pytest.raises(ValueError, match="130"):
        gravest([0, 130])


@pytest.mark.parametrize(
    ("kind", "code"),
    [("finished", 0), ("failed", 1), ("refused", 2), ("terminated", 3), ("preempted", 3), ("something else", 1)],
)
def test_a_stop_record_tells_the_code(kind: str, code: int, tmp_path: Path) -> None:
    outcome = Outcome(kind=kind, step=7, message="why")
    assert outcome.exit_code == code
    write_outcome(tmp_path, outcome)
    assert read_outcome(tmp_path) == outcome


def test_a_stop_record_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    assert read_outcome(tmp_path) is None
    (tmp_path / OUTCOME).write_text('{"kind": 3}')
    assert read_outcome(tmp_path) is None
    (tmp_path / OUTCOME).unlink()
    os.mkfifo(tmp_path / OUTCOME)
    assert read_outcome(tmp_path) is None


def test_a_stop_record_that_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    write_outcome(tmp_path / "gone", Outcome(kind="finished", step=1))
    assert not (tmp_path / "gone").exists()
