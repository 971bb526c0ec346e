"""Rows of runs as Arrow tables, whatever hooks wrote into them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import regrow
from regrow.launch.api.metrics import table_of


def write(run: Path, *rows: Mapping[str, Any]) -> None:
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_missing_values_are_null(tmp_path: Path) -> None:
    write(tmp_path / "run", {"step": 1, "loss": 2.5, "mfu": None}, {"step": 2, "loss": 2, "val_loss": 2.25})
    table = regrow.read_metrics(tmp_path / "run")
    assert table.column_names == ["step", "loss", "mfu", "val_loss"]
    assert [str(t) for t in table.schema.types] == ["int64", "double", "double", "double"]
    assert table.to_pylist() == [
        {"step": 1, "loss": 2.5, "mfu": None, "val_loss": None},
        {"step": 2, "loss": 2.0, "mfu": None, "val_loss": 2.25},
    ]


def test_the_runs_of_a_sweep_stand_below_each_other(tmp_path: Path) -> None:
    write(tmp_path / "b", {"step": 1, "loss": 2.0})
    write(tmp_path / "a/deep", {"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5, "note": "x"})
    write(tmp_path / "b/lineages/0-abcd", {"step": 1, "loss": 9.0})
    table = regrow.read_metrics(str(tmp_path))
    assert table.column("run").to_pylist() == ["a/deep", "a/deep", "b"]
    assert table.column("step").to_pylist() == [1, 2, 1]
    assert table.column("note").to_pylist() == [None, "x", None]
    assert regrow.read_metrics(tmp_path / "b").column("loss").to_pylist() == [2.0]


def test_a_run_without_rows_has_no_rows(tmp_path: Path) -> None:
    write(tmp_path / "run")
    table = regrow.read_metrics(tmp_path / "run")
    assert (table.num_rows, table.column_names) == (0, ["step"])


@pytest.mark.parametrize("name", [".", "nowhere"])
def test_what_is_no_run_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="must be a run or a folder with runs in it, but is neither"):
        regrow.read_metrics(tmp_path / name)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)
rows = st.lists(st.dictionaries(st.sampled_from("abc"), values), max_size=4)


@settings(deadline=None)
@given(rows)
def test_any_rows_make_a_table(rows: list[dict[str, Any]]) -> None:
    rows = [{"step": i, **row} for i, row in enumerate(rows)]
    found = table_of(rows).to_pylist()
    assert len(found) == len(rows)
    for row, back in zip(rows, found, strict=True):
        for name, value in back.items():
            given = row.get(name)
            if not isinstance(value, str):
                assert value == given or value == pytest.approx(given)
            else:
                assert value == given or json.loads(value) == given
