"""Records of .jsonl files, compressed or not: a JSON object a line."""

import codecs
import functools
import io
import json
from collections.abc import Iterator
from typing import Any

from regrow.trainer.data.corpus_files import Cursor, newlines, open_bytes, reading
from regrow.trainer.data.corpus_paths import CorpusFile, ending_of
from regrow.trainer.data.records import EMPTY_FILE, BadRecordError, BadRecords, Record, kind_of
from regrow.trainer.data.source import CorpusPart, shown

__all__ = ["parts", "read"]

_PART_BYTES = 64 << 20
# A line of a compressed file may be as long as text that compresses well, and this much in any case; nothing larger
# is put together in memory, nor any line beyond the last of them.
_LINE_BYTES = 8 << 20
_LINE_FACTOR = 8
_LONGEST_BYTES = 1 << 30


def parts(file: CorpusFile) -> list[CorpusPart]:
    """Ranges of bytes; a compressed file is one part, whose damage shows only at its end."""
    if ending_of(file) != ".jsonl":
        return [CorpusPart(file.name)]
    with reading(file):
        size = file.size()
    return [CorpusPart(file.name, s, s + _PART_BYTES) for s in range(0, size, _PART_BYTES)]


def read(file: CorpusFile, start: int, stop: int, bad: BadRecords) -> Iterator[Record]:
    """The records whose lines begin within [start, stop).

    Args:
        file: the file.
        start: a byte; 0 for a compressed file.
        stop: a byte; -1 is the end.
        bad: told of lines that are no records.

    Raises:
        DataError: naming the file and line.
    """
    cursor = Cursor(file, "line")
    with reading(file, cursor), open_bytes(file) as raw:
        limit = min(_LINE_BYTES + _LINE_FACTOR * file.size(), _LONGEST_BYTES)
        begin = 0
        if start > 0:
            raw.seek(start - 1)
            # The line that begins before `start` belongs to the part before.
            while (rest := raw.readline(_LINE_BYTES)) and not rest.endswith(b"\n"):
                continue
            begin = raw.tell()
            cursor.before = functools.cache(functools.partial(newlines, file, begin))
        if 0 <= stop <= begin:
            return
        for body in _lines(raw, cursor, limit, bad, begins=begin == 0):
            if body.strip():
                try:
                    value = _parsed(body, cursor)
                except BadRecordError as error:
                    bad.meet(error)
                else:
                    yield Record(value, cursor.place())
            if stop >= 0 and raw.tell() >= stop:
                return
        if start == 0 and cursor.nth == 0:
            bad.notes.add(EMPTY_FILE, file.__str__)


def _lines(raw: io.BufferedReader, cursor: Cursor, limit: int, bad: BadRecords, *, begins: bool) -> Iterator[bytes]:
    """The rest of a file's lines, counted by `cursor`; those passed over are empty.

    Args:
        raw: the file, at the beginning of a line.
        cursor: counts them.
        limit: bytes; no longer line is put together.
        bad: told of longer ones.
        begins: `raw` is at the file's beginning, where a byte order mark may be.
    """
    while body := raw.readline(limit + 1):
        cursor.nth += 1
        if len(body) > limit:
            bad.meet(
                BadRecordError(
                    "too long a line",
                    cursor.place(),
                    f"data.files must have lines of at most {limit >> 20} MiB here, but {cursor.place()} is longer; "
                    "cut its text into documents",
                )
            )
            while not body.endswith(b"\n") and (body := raw.readline(_LINE_BYTES)):
                continue
            body = b""
        yield body.removeprefix(codecs.BOM_UTF8) if begins else body
        begins = False


def _parsed(body: bytes, cursor: Cursor) -> dict[str, Any]:
    """A line's JSON object.

    Raises:
        BadRecordError: it is none.
    """
    try:
        value = json.loads(body.decode())
    except UnicodeDecodeError as error:
        place = cursor.place()
        raise BadRecordError(
            "not UTF-8",
            place,
            f"data.files must be UTF-8, but {place} is not (byte {error.start + 1}: {error.reason}); "
            "convert or remove it",
        ) from None
    except (RecursionError, ValueError) as error:
        reason = str(error)
        if isinstance(error, RecursionError):
            reason = "it is nested too deeply"
        elif isinstance(error, json.JSONDecodeError):
            reason = f"{error.msg.removesuffix(' at')} at character {error.pos}"
        place = cursor.place()
        raise BadRecordError(
            "not JSON",
            place,
            f"data.files must hold a JSON object a line, but {place} is none ({shown(reason)}), it begins with "
            f"{_short(body)}; mend or remove it",
        ) from None
    if not isinstance(value, dict):
        place = cursor.place()
        raise BadRecordError(
            f"a {kind_of(value)} instead of a JSON object",
            place,
            f"data.files must hold a JSON object a line, but {place} is a {kind_of(value)}, it begins with "
            f"{_short(body)}; mend or remove it",
        )
    return value


def _short(body: bytes) -> str:
    return repr(body[:60].decode(errors="replace").rstrip())
