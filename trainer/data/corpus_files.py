"""Reading a corpus' files: regular ones only, whole, as UTF-8; or one sentence that says where they are not."""

import codecs
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from msgspec import Struct

from regrow.trainer.data.corpus_paths import CorpusFile, cannot_be_read, ending_of
from regrow.trainer.data.decompression import DAMAGE, decompressed
from regrow.trainer.data.source import DataError, shown

__all__ = ["NULL_TEXT", "Cursor", "Place", "newlines", "open_bytes", "read_text", "reading"]

_CHUNK_BYTES = 1 << 20
_HEAD_BYTES = 1 << 10
_BOMS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
NULL_TEXT = "null instead of text, passed over"


class Place(Struct, frozen=True):
    """Where a record is; as a text, for instance `line 7 of a.jsonl`.

    Attributes:
        file: which holds it.
        unit: `line` or `row`.
        nth: which of the part that is read, from 1.
        before: says how many lie before the part; asked only for the text.
    """

    file: CorpusFile
    unit: str
    nth: int
    before: Callable[[], int]

    def __str__(self) -> str:
        return f"{self.unit} {self.nth + self.before()} of {self.file}"


@dataclass(slots=True)
class Cursor:
    """Where a reader of a part of a file stands: the record that it read last. See `Place`."""

    file: CorpusFile
    unit: str
    nth: int = 0
    before: Callable[[], int] = field(default=lambda: 0)

    def place(self) -> Place:
        """The place of that record."""
        return Place(self.file, self.unit, self.nth, self.before)


@contextmanager
def reading(file: CorpusFile, cursor: Cursor | None = None) -> Iterator[None]:
    """Turns what reading `file` raises into one sentence.

    Args:
        file: the file.
        cursor: at what could be read last, of a file that is read from its beginning.

    Raises:
        DataError: it cannot be opened or read, is another kind of file, cut short or damaged.
    """
    try:
        yield
    except EOFError:
        raise DataError(
            f"data.files must be whole, but {file} is cut short{_after(cursor)}; fetch or compress it again"
        ) from None
    except DAMAGE as error:
        raise DataError(
            f"data.files must be sound, but {file} is damaged{_after(cursor)} ({shown(str(error))}); fetch it again"
        ) from error
    except OSError as error:
        raise cannot_be_read(file.name, error) from error


def _after(cursor: Cursor | None) -> str:
    return f" after {cursor.unit} {cursor.nth}" if cursor is not None else ""


def newlines(file: CorpusFile, stop: int) -> int:
    """Line ends before the byte `stop`."""
    if not stop:
        return 0
    count = 0
    with file.open() as raw:
        while stop > 0 and (chunk := raw.read(min(stop, _CHUNK_BYTES))):
            count += chunk.count(b"\n")
            stop -= len(chunk)
    return count


@contextmanager
def open_bytes(file: CorpusFile) -> Iterator[io.BufferedReader]:
    """The file's bytes, decompressed; they are not those of UTF-16 or UTF-32.

    Raises:
        DataError: they are.
    """
    with file.open() as raw, decompressed(raw, ending_of(file)) as plain:
        _check_encoding(file, plain.peek(_HEAD_BYTES))
        yield plain


def _check_encoding(file: CorpusFile, head: bytes) -> None:
    """Refuses UTF-16 and UTF-32, known by their byte order marks or, without, by the zeros among western letters."""
    head = head[:_HEAD_BYTES]
    found = next((name for bom, name in _BOMS.items() if head.startswith(bom)), None)
    if found is None and head.count(0) * 4 >= len(head) > 0:
        found = "UTF-16 or binary"
    if found is not None:
        name = found.split()[0]
        raise DataError(
            f"data.files must be UTF-8, but {file} is {found}; convert it (iconv -f {name} -t UTF-8 IN > OUT)"
        )


def read_text(file: CorpusFile, size: int) -> Iterator[str]:
    """A .txt file's documents: cut at the first blank line after `size` characters; 0 leaves the file whole.

    Raises:
        DataError: naming the file, and the line where it is not UTF-8.
    """
    with reading(file), open_bytes(file) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as lines:
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
                f"data.files must be UTF-8, but {_first_not_utf8(file)} ({error.reason}); convert it "
                "(iconv -f ENCODING -t UTF-8 IN > OUT)"
            ) from None


def _first_not_utf8(file: CorpusFile) -> str:
    """The first line that is not, and the byte within the file."""
    offset = 0
    with file.open() as raw:
        for number, line in enumerate(raw, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"line {number} of {file} is not, at byte {offset + error.start}"
            offset += len(line)
    return f"{file} is not"
