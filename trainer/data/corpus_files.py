"""Reading a corpus' files: regular ones only, whole, as UTF-8; or one sentence that says where they are not."""

import codecs
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, final

import zstandard

from regrow.checkpoint.files import open_regular
from regrow.trainer.data.source import DataError, Notes, shown

__all__ = ["NULL_TEXT", "check_regular", "read_json_lines", "read_text", "reading"]

# A line of a compressed file may be as long as text that compresses well, and this much in any case; nothing larger
# is put together in memory.
_LINE_BYTES = 8 << 20
_LINE_FACTOR = 8
# A kibibyte of zstd's shortest blocks becomes 32 MiB.
_ZSTD_STEP_BYTES = 1 << 10
_HEAD_BYTES = 1 << 10
_BOMS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
# Halves that belong together were joined when the JSON was read.
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
NULL_TEXT = "null instead of text, passed over"
_SURROGATE = "half a surrogate pair in the text, replaced by U+FFFD"


@dataclass(slots=True)
class Line:
    """Where a reader stands.

    Attributes:
        path: the file.
        part_start: the byte at which the part's first line begins.
        nth: lines read in the part.
    """

    path: Path
    part_start: int = 0
    nth: int = 0

    def __str__(self) -> str:
        return f"line {self.nth + _newlines(self.path, self.part_start)} of {self.path}"


@contextmanager
def reading(path: Path, line: Line | None = None) -> Iterator[None]:
    """Turns what reading `path` raises into one sentence.

    Args:
        path: the file.
        line: the last that could be read, of a compressed file.

    Raises:
        DataError: it cannot be opened or read, is another kind of file, cut short or damaged.
    """
    try:
        yield
    except EOFError:
        raise DataError(
            f"data.files must be whole, but {path} is cut short{_after(line)}; fetch or compress it again"
        ) from None
    except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise DataError(
            f"data.files must be sound, but {path} is damaged{_after(line)} ({shown(str(error))}); fetch it again"
        ) from error
    except OSError as error:
        raise DataError(
            f"data.files must be files that can be read, but {path} cannot ({error.strerror or error}); check it"
        ) from error


def _after(line: Line | None) -> str:
    return f" after line {line.nth}" if line is not None else ""


def _newlines(path: Path, stop: int) -> int:
    """Line ends before the byte `stop`."""
    if not stop:
        return 0
    count = 0
    with os.fdopen(open_regular(path), "rb") as file:
        while stop > 0 and (chunk := file.read(min(stop, 1 << 20))):
            count += chunk.count(b"\n")
            stop -= len(chunk)
    return count


@final
class _ZstdReader(io.RawIOBase):
    """The bytes of all frames of a .zst file; tells a cut file from a whole one, as the library's reader does not."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        # The library's limit of 128 MiB on a frame's window holds.
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame = self._decompressor.decompressobj()
        self._pending = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, out: Any) -> int:
        """Fills `out`; 0 at the end.

        Raises:
            EOFError: the file ends within a frame, or is empty.
        """
        while not self._ready:
            data = self._pending or self._raw.read(_ZSTD_STEP_BYTES)
            if not data:
                if not self._frame.eof:
                    raise EOFError
                return 0
            if self._frame.eof:
                self._frame = self._decompressor.decompressobj()
            self._ready = memoryview(self._frame.decompress(data))
            self._pending = self._frame.unused_data if self._frame.eof else b""
        count = min(len(out), len(self._ready))
        out[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


@contextmanager
def _open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed; they are not those of UTF-16 or UTF-32."""
    with os.fdopen(open_regular(path), "rb") as raw:
        if path.suffix == ".gz":
            if len(raw.peek(2)) < 2:
                raise EOFError  # the gzip module takes nothing at all for an empty text
            with gzip.GzipFile(fileobj=raw) as unzipped, io.BufferedReader(unzipped, 1 << 16) as file:
                _check_encoding(path, file.peek(_HEAD_BYTES))
                yield file
        elif path.suffix == ".zst":
            with io.BufferedReader(_ZstdReader(raw), 1 << 16) as file:
                _check_encoding(path, file.peek(_HEAD_BYTES))
                yield file
        else:
            _check_encoding(path, raw.peek(_HEAD_BYTES))
            yield raw


def _check_encoding(path: Path, head: bytes) -> None:
    """Refuses UTF-16 and UTF-32, known by their byte order marks or, without, by the zeros among western letters."""
    head = head[:_HEAD_BYTES]
    found = next((name for bom, name in _BOMS.items() if head.startswith(bom)), None)
    if found is None and head.count(0) * 4 >= len(head) > 0:
        found = "UTF-16 or binary"
    if found is not None:
        name = found.split()[0]
        raise DataError(
            f"data.files must be UTF-8, but {path} is {found}; convert it (iconv -f {name} -t UTF-8 IN > OUT)"
        )


def _lines(file: IO[bytes], line: Line, limit: int) -> Iterator[bytes]:
    """The rest of a file's lines, without a byte order mark; counted in `line`."""
    while body := file.readline(limit + 1):
        line.nth += 1
        if len(body) > limit:
            raise DataError(
                f"data.files must have lines of at most {limit >> 20} MiB here, but {line} is longer; cut its text "
                "into documents"
            )
        first = line.nth == 1 and line.part_start == 0
        yield body.removeprefix(codecs.BOM_UTF8) if first else body


def read_json_lines(path: Path, field: str, notes: Notes, start: int = 0, stop: int = -1) -> Iterator[str]:
    """The texts of the records whose lines begin within [start, stop) of a .jsonl file, compressed or not.

    Args:
        path: the file.
        field: of the text.
        notes: told of records without text and of replaced characters.
        start: a byte; 0 for a compressed file.
        stop: a byte; -1 is the end.

    Raises:
        DataError: naming the file and line.
    """
    line = Line(path)
    with reading(path, line), _open_bytes(path) as file:
        limit = _LINE_BYTES + _LINE_FACTOR * path.stat().st_size
        if start > 0:
            file.seek(start - 1)
            # The line that begins before `start` belongs to the part before.
            while (rest := file.readline(_LINE_BYTES)) and not rest.endswith(b"\n"):
                continue
            line.part_start = file.tell()
        if 0 <= stop <= line.part_start:
            return
        for body in _lines(file, line, limit):
            if body.strip():
                text = _text_of(body, field, line, notes)
                if text:
                    yield text
            if stop >= 0 and file.tell() >= stop:
                return


def _text_of(body: bytes, field: str, line: Line, notes: Notes) -> str | None:
    """A record's text."""
    try:
        record = json.loads(body.decode())
    except UnicodeDecodeError as error:
        raise DataError(
            f"data.files must be UTF-8, but {line} is not (byte {error.start + 1}: {error.reason}); "
            "convert or remove it"
        ) from None
    except (RecursionError, ValueError) as error:
        reason = str(error)
        if isinstance(error, RecursionError):
            reason = "it is nested too deeply"
        elif isinstance(error, json.JSONDecodeError):
            reason = f"{error.msg.removesuffix(' at')} at character {error.pos}"
        raise DataError(
            f"data.files must hold a JSON object a line, but {line} is none ({shown(reason)}), it begins with "
            f"{_short(body)}; mend or remove it"
        ) from None
    if not isinstance(record, dict):
        raise DataError(
            f"data.files must hold a JSON object a line, but {line} is a {_kind(record)}, it begins with "
            f"{_short(body)}; mend or remove it"
        )
    if field not in record:
        names = ", ".join(map(repr, list(record)[:20])) or "none"
        raise DataError(
            f"data.field must be a field of every record, but {line} has no {field!r}, only {shown(names)}; "
            "set data.field"
        )
    text: object = record[field]
    if text is None:
        notes.add(NULL_TEXT, line.__str__)
        return None
    if not isinstance(text, str):
        raise DataError(
            f"data.field must name text, but {field!r} in {line} is a {_kind(text)}; set data.field or convert it"
        )
    if _LONE_SURROGATE.search(text):
        notes.add(_SURROGATE, line.__str__)
        return _LONE_SURROGATE.sub("\ufffd", text)
    return text


def _kind(value: object) -> str:
    names = {dict: "JSON object", list: "list", bool: "true or false", int: "number", float: "number", str: "text"}
    return names.get(type(value), "null")


def _short(body: bytes) -> str:
    return repr(body[:60].decode(errors="replace").rstrip())


def read_text(path: Path, size: int) -> Iterator[str]:
    """A .txt file's documents: cut at the first blank line after `size` characters; 0 leaves the file whole.

    Raises:
        DataError: naming the file, and the line where it is not UTF-8.
    """
    with reading(path), _open_bytes(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as lines:
        try:
            if size == 0:
                yield lines.read()
                return
            parts: list[str] = []
            length = 0
            for line in lines:
                parts.append(line)
                length += len(line)
                if length >= size and not line.strip():
                    yield "".join(parts)
                    parts, length = [], 0
            if "".join(parts).strip():
                yield "".join(parts)
        except UnicodeDecodeError as error:
            raise DataError(
                f"data.files must be UTF-8, but {_first_not_utf8(path)} ({error.reason}); convert it "
                "(iconv -f ENCODING -t UTF-8 IN > OUT)"
            ) from None


def _first_not_utf8(path: Path) -> str:
    """The first line that is not, and the byte within the file."""
    offset = 0
    with os.fdopen(open_regular(path), "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"line {number} of {path} is not, at byte {offset + error.start}"
            offset += len(line)
    return f"{path} is not"


def check_regular(path: Path) -> None:
    """Opens the file and closes it.

    Raises:
        OSError: it cannot be opened, or is another kind of file.
    """
    os.close(open_regular(path))
