"""`regrow.read_metrics`: the rows of a run, or of all runs of a sweep, as an Arrow table. No torch."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from regrow.checkpoint.errors import CheckpointError
from regrow.trainer.jsonlines import read_rows
from regrow.trainer.run_files import METRICS
from regrow.trainer.run_folders import is_run, run_folders

__all__ = ["read_metrics"]

RUN = "run"


def read_metrics(place: str | Path) -> pa.Table:
    """The metrics of a run as it stands, or of every run below a folder.

    Args:
        place: a run's directory, a `metrics.jsonl`, or a folder with runs in it (a sweep, `outputs`).

    Returns:
        A row for each step, in order: `step`, `loss`, `lr` and whatever else was measured; null where a step has no
        value (`val_loss` is there every few steps). Of a folder, a first column `run` has the run's path below it.
        `.to_pandas()` makes it a data frame. What a run did before it went back to an earlier step is not in it; that
        lies in `RUN/lineages/`.

    Raises:
        ValueError: there is no run.
    """
    path = Path(place).expanduser()
    if path.is_file():
        return table_of(list(read_rows(path)))
    if is_run(path):
        return table_of(list(read_rows(path / METRICS)))
    folders = run_folders(path) if path.is_dir() else []
    if not folders:
        raise CheckpointError(f"{path} must be a run or a folder with runs in it, but is neither; check the path")
    names = [str(folder.relative_to(path)) for folder in folders]
    rows = [
        {RUN: name, **row} for name, folder in zip(names, folders, strict=True) for row in read_rows(folder / METRICS)
    ]
    return table_of(rows, first=(RUN, "step"))


def table_of(rows: Sequence[Mapping[str, Any]], first: Sequence[str] = ("step",)) -> pa.Table:
    """Rows as columns: whole numbers, numbers, truth values and texts; anything else as its JSON text.

    Args:
        rows: objects, whose names may differ.
        first: the columns that are always there, in front.
    """
    names = list(dict.fromkeys([*first, *(name for row in rows for name in row)]))
    return pa.table({name: _column(name, [row.get(name) for row in rows]) for name in names})


def _column(name: str, values: list[Any]) -> pa.Array:
    kinds = {type(v) for v in values if v is not None}
    if not kinds:
        # Of a run without rows, or a measure that this machine does not have.
        kind = {RUN: pa.string(), "step": pa.int64()}.get(name, pa.float64())
        return pa.array(values, kind)
    if kinds <= {int, float} and kinds != {int}:
        return pa.array([None if v is None else float(v) for v in values], pa.float64())
    for only, kind in ((int, pa.int64()), (bool, pa.bool_()), (str, pa.string())):
        if kinds == {only}:
            try:
                return pa.array(values, kind)
            except (OverflowError, UnicodeEncodeError, pa.ArrowInvalid):
                break
    return pa.array([None if v is None else json.dumps(v) for v in values], pa.string())
