"""Files with one JSON object a step, which survive kills and are cut back on resume."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

from checkpoint.files import fsync_folder

__all__ = ["StepLog", "read_rows", "rewrite_rows"]


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file; a last line that a kill cut short is left out, a missing file has none."""
    if not path.exists():
        return
    with path.open() as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                return
            if not line.endswith("\n") or not isinstance(row, dict):
                return
            yield row


def rewrite_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replaces a file's rows, durably."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)
        out.flush()
        os.fsync(out.fileno())
    temporary.rename(path)
    fsync_folder(path.parent)


@final
class StepLog:
    """Appends one row a step.

    Args:
        path: the file; rows beyond `last_step` are dropped from it.
        last_step: the step that training continues from.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        self._drop_after(path, last_step)
        self._file = path.open("a")
        fsync_folder(path.parent)

    @staticmethod
    def _drop_after(path: Path, last_step: int) -> None:
        if not path.exists():
            return
        rewrite_rows(path, [row for row in read_rows(path) if row["step"] <= last_step])

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes a row; other processes see it at once."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def make_durable(self) -> None:
        """Flushes the rows so far to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Ends the file."""
        self._file.close()
