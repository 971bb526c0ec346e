"""Files with one JSON object a step, which survive kills and full disks, and are cut back on resume."""

import errno
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

from regrow.checkpoint.files import fsync_folder, naming, open_regular

__all__ = ["RowTail", "StepLog", "read_rows", "rewrite_rows"]

log = logging.getLogger(__name__)

# Read at once by a tail.
_TAIL_BYTES = 1 << 20


def read_rows(path: Path, damaged: list[int] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a file; a last line that a kill cut short is left out, a missing file has none.

    Args:
        path: the file.
        damaged: receives the numbers of other lines that cannot be read; they are passed over.

    Raises:
        OSError: it cannot be read, or is not a regular file.
    """
    try:
        descriptor = open_regular(path)
    except FileNotFoundError:
        return
    with os.fdopen(descriptor, encoding="utf-8", errors="replace") as lines, naming(path):
        for number, line in enumerate(lines, 1):
            row = _row_of(line)
            if row is not None:
                yield row
            elif line.endswith("\n") and damaged is not None:
                damaged.append(number)


def _row_of(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line) if line.endswith("\n") else None
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def rewrite_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replaces a file's rows, durably."""
    temporary = path.with_name(f".{path.name}.tmp")
    with naming(path):
        with temporary.open("w") as out:
            out.writelines(json.dumps(row) + "\n" for row in rows)
            out.flush()
            os.fsync(out.fileno())
        temporary.rename(path)
        fsync_folder(path.parent)


@final
class StepLog:
    """Appends one row a step. Rows that the disk does not take now are kept and written when it does.

    Args:
        path: the file; rows beyond `last_step` are dropped from it.
        last_step: the step that training continues from.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        if path.exists():
            damaged: list[int] = []
            rows = [row for row in read_rows(path, damaged) if row["step"] <= last_step]
            if damaged:
                kept = path.with_name(f"{path.name}.damaged")
                shutil.copyfile(path, kept)
                log.warning("%s has lines that cannot be read (%s); the file as it was is %s", path, damaged, kept)
            rewrite_rows(path, rows)
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._size = os.fstat(self._file).st_size
        self._waiting = b""
        with naming(path):
            fsync_folder(path.parent)

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes a row; other processes see it at once."""
        was_behind = bool(self._waiting)
        self._waiting += (json.dumps(row) + "\n").encode()
        try:
            self._write()
        except OSError as error:
            if not was_behind:
                log.warning("%s cannot be written now (%s); its rows are kept", self._path, error.strerror)

    def _write(self) -> None:
        """Writes what is waiting, all of it or nothing."""
        try:
            written = os.write(self._file, self._waiting)
            if written < len(self._waiting):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(self._file, self._size)
            raise
        self._size += written
        self._waiting = b""

    def make_durable(self) -> None:
        """Flushes the rows so far to the disk; raises OSError while it does not take them."""
        if self._waiting:
            self._write()
        os.fsync(self._file)

    def close(self) -> None:
        """Ends the file."""
        os.close(self._file)


@final
class RowTail:
    """Reads the rows that a file gains, each once.

    The file may be missing yet, and grows at its end alone while this is used; a line without its end is read later.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> list[dict[str, Any]]:
        """The next rows, a few thousand at most; none where there are no more now.

        Raises:
            OSError: the file cannot be read, or is not a regular file.
        """
        try:
            descriptor = open_regular(self._path)
        except FileNotFoundError:
            return []
        with os.fdopen(descriptor, "rb") as file, naming(self._path):
            rows: list[dict[str, Any]] = []
            file.seek(self._offset)
            # Lines that cannot be read are passed over, unless nothing else has come.
            while not rows and (lines := [line for line in file.readlines(_TAIL_BYTES) if line.endswith(b"\n")]):
                self._offset += sum(map(len, lines))
                found = [_row_of(line.decode(errors="replace")) for line in lines]
                rows = [row for row in found if row is not None]
            return rows
