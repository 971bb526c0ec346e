"""Rows as columns of numbers."""

import json
from pathlib import Path
from typing import Any

import pytest

from regrow.checkpoint.policy.lineage import Lineage, StartKind
from regrow.trainer.jsonlines import read_rows
from regrow.trainer.report.columns import read_columns, read_evaluations, read_rows_at_once


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_columns_hold_what_is_a_number(tmp_path: Path) -> None:
    path = write(
        tmp_path / "m",
        {"step": 1, "loss": 3, "tokens": 10, "step_time_s": 0.5, "mfu": None, "note": "x", "on": True},
        {"step": 2, "loss": 2.5, "tokens": 20, "step_time_s": 0.25, "grad_norm": None, "val_loss": 9.0},
    )
    columns = read_columns(path)
    assert columns.steps == [1, 2]
    assert columns.tokens == [10, 20]
    assert columns.seconds == [0.5, 0.75]
    assert columns.curves == {
        "loss": ([1, 2], [3.0, 2.5]),
        "step_time_s": ([1, 2], [0.5, 0.25]),
        "val_loss": ([2], [9.0]),
    }


def test_what_is_not_finite_is_no_point(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": 1.5}\n{"step": 3, "loss": Infinity}\n')
    assert read_columns(path).curves == {"loss": ([2], [1.5])}


@pytest.mark.parametrize(
    "text",
    ["", '{"step": 1}\n', '{"step": 1}\n{"step": 2', '{"step": 1}\nnonsense\n{"step": 2}\n', '[1]\n{"step": 2}\n',
     '{"step": "1"}\n{"step": 2}\n', '{"step": 1}\n\n{"step": 2}\n', '{"step": 1}, {"step": 5}\n{"step": 2}\n',
     '{"step": 1, "loss": NaN}\n'],
)  # fmt: skip
def test_rows_read_at_once_are_the_rows(tmp_path: Path, text: str) -> None:
    path = tmp_path / "m"
    path.write_text(text)
    assert repr(read_rows_at_once(path)) == repr(list(read_rows(path)))


def test_a_missing_file_has_no_rows(tmp_path: Path) -> None:
    assert read_columns(tmp_path / "none").curves == {}


def test_evaluations_are_those_of_the_run_as_it_stands(tmp_path: Path) -> None:
    lineages = [Lineage(id="0"), Lineage(id="1", origin=StartKind.step, origin_step=10, parent="0")]
    path = write(
        tmp_path / "e",
        {"step": 20, "lineage": "0", "task": "t", "metrics": {"acc": 0.9}},
        {"step": 20, "lineage": "1", "task": "t", "metrics": {"acc": 0.5, "name": "x"}},
        {"step": 10, "lineage": "0", "task": "t", "metrics": {"acc": 0.25}},
    )
    assert read_evaluations(path, lineages) == {"eval/t/acc": ([10, 20], [0.25, 0.5])}
