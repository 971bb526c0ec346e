"""A table of all steps, as a CSV file."""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, final

from regrow.checkpoint.files import fsync_folder, open_regular
from regrow.trainer.hooks.logger import LoggedRun, LoggerHook, RunEnd, Store, measured
from regrow.trainer.hooks.logger_config import CsvHookConfig

__all__ = ["CsvHook"]


@final
class CsvHook(LoggerHook):
    """See `CsvConfig`. A lineage that goes back has a file of its own."""

    NAME = "csv"
    TITLE = "The CSV file"

    def __init__(self, config: CsvHookConfig) -> None:
        super().__init__()
        self._config = config.settings

    def open_store(self, run: LoggedRun) -> Store:
        """The run's file."""
        if self._config.folder is not None:
            return _CsvFile(Path(self._config.folder).expanduser() / f"{run.name}.csv")
        return _CsvFile(run.run_dir / (f"metrics-{run.line.branch}.csv" if run.line.branch else "metrics.csv"))


@final
class _CsvFile(Store):
    """One file; where a row brings a column that was not there, it is written anew with it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._columns, rows, whole = _read(path)
        self._last = int(rows[-1]["step"]) if rows else 0
        if not whole:
            # A kill left part of a line.
            self._rewrite(rows)
        self._file: TextIO | None = None

    def last_step(self) -> int:
        return self._last

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        values = [{"step": row["step"], **measured(row)} for row in rows]
        new = dict.fromkeys(name for row in values for name in row if name not in self._columns)
        if new:
            self._close_file()
            self._columns = [*self._columns, *new]
            # The old name is read to its end before the new one takes its place.
            self._rewrite([*_read(self._path)[1], *values])
        else:
            if self._file is None:
                self._file = self._path.open("a", newline="")
            csv.DictWriter(self._file, self._columns).writerows(values)
            self._file.flush()
        self._last = values[-1]["step"]

    def close(self, end: RunEnd | None) -> None:
        self._close_file()

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _rewrite(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replaces the file, durably."""
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        with temporary.open("w", newline="") as out:
            writer = csv.DictWriter(out, self._columns)
            writer.writeheader()
            writer.writerows(rows)
            out.flush()
            os.fsync(out.fileno())
        temporary.rename(self._path)
        fsync_folder(self._path.parent)


def _read(path: Path) -> tuple[list[str], list[dict[str, str]], bool]:
    """The columns and rows of a file up to the first line that is no row, and whether there is none such."""
    try:
        descriptor = open_regular(path)
    except FileNotFoundError:
        return [], [], True
    with os.fdopen(descriptor, newline="", errors="replace") as file:
        # The writer ends each line so; a line that a kill cut short has no such end.
        lines = file.read().split("\r\n")
    columns = next(csv.reader(lines[:1])) if len(lines) > 1 else []
    if "step" not in columns:
        return [], [], lines == [""]
    rows: list[dict[str, str]] = []
    for cells in csv.reader(lines[1:-1]):
        row = dict(zip(columns, cells, strict=False))
        if len(cells) != len(columns) or not row["step"].isdecimal() or int(row["step"]) <= _last(rows):
            return columns, rows, False
        rows.append(row)
    return columns, rows, lines[-1] == ""


def _last(rows: Sequence[Mapping[str, str]]) -> int:
    return int(rows[-1]["step"]) if rows else 0
