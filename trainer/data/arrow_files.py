"""Records of Arrow IPC files (.arrow), of the file format and of the stream format, as `datasets` saves them."""

import functools
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from regrow.trainer.data.arrow_rows import arrow_reading, check_columns, records_of
from regrow.trainer.data.corpus_files import Cursor
from regrow.trainer.data.corpus_paths import CorpusFile
from regrow.trainer.data.records import EMPTY_FILE, BadRecords, Record
from regrow.trainer.data.source import CorpusPart, DataError

__all__ = ["parts", "read", "schema"]

_PART_BYTES = 64 << 20
_MAGIC = b"ARROW1"
# What ends a stream: Arrow's own reader takes a missing one for the end, too.
_END = b"\xff\xff\xff\xff\0\0\0\0"


def parts(file: CorpusFile) -> list[CorpusPart]:
    """Ranges of record batches; a stream, which has no index of them, is one part.

    Raises:
        DataError: it is no such file.
    """
    with arrow_reading(file, "Arrow"), _open(file) as (reader, _):
        if not _is_indexed(reader):
            return [CorpusPart(file.name)]
        count = int(reader.num_record_batches)
        step = max(1, _PART_BYTES * count // max(1, file.size()))
        return [CorpusPart(file.name, b, min(b + step, count)) for b in range(0, count, step)]


def schema(file: CorpusFile) -> Any:
    """The file's columns, as Arrow's schema.

    Raises:
        DataError: it is no such file.
    """
    with arrow_reading(file, "Arrow"), _open(file) as (reader, _):
        return reader.schema


def read(file: CorpusFile, start: int, stop: int, columns: Sequence[str] | None, bad: BadRecords) -> Iterator[Record]:
    """The rows of the record batches [start, stop), a batch in memory at a time.

    Args:
        file: the file.
        start: a record batch; 0 for a stream.
        stop: a record batch; -1 is the end.
        columns: that are read, by their names at the top; None is all.
        bad: told of rows that cannot be used.

    Raises:
        DataError: naming the file and row.
    """
    cursor = Cursor(file, "row", before=functools.cache(functools.partial(_rows_before, file, start)))
    with arrow_reading(file, "Arrow", cursor), _open(file, columns) as (reader, raw):
        if _is_indexed(reader):
            last = reader.num_record_batches if stop < 0 else stop
            batches = (reader.get_batch(b) for b in range(start, last))
        else:
            batches = iter(reader)
        for batch in batches:
            _check(batch)
            yield from records_of(batch, cursor, bad)
        if not _is_indexed(reader):
            _check_end(raw, file)
            if cursor.nth == 0:
                bad.notes.add(EMPTY_FILE, file.__str__)


def _is_indexed(reader: Any) -> bool:
    return isinstance(reader, pa.RecordBatchFileReader)


@contextmanager
def _open(file: CorpusFile, columns: Sequence[str] | None = None) -> Iterator[tuple[Any, io.BufferedReader]]:
    """A reader of either format, and the file below it."""
    with file.open() as raw:
        begin = pa.ipc.open_file if raw.peek(len(_MAGIC)).startswith(_MAGIC) else pa.ipc.open_stream
        reader = begin(pa.PythonFile(raw, mode="r"))
        names = reader.schema.names
        check_columns(reader.schema, names if columns is None else columns, file)
        if columns is not None:
            raw.seek(0)
            options = pa.ipc.IpcReadOptions(included_fields=[names.index(c) for c in columns])
            reader = begin(pa.PythonFile(raw, mode="r"), options=options)
        yield reader, raw


def _rows_before(file: CorpusFile, batch: int) -> int:
    with _open(file) as (reader, _):
        return sum(reader.get_batch(b).num_rows for b in range(batch))


def _check(batch: Any) -> None:
    """Whether the batch is what its type says: a damaged file's offsets may lead anywhere.

    Text that is not UTF-8 is left for its row.

    Raises:
        pa.ArrowInvalid: it is not.
    """
    for column in batch.columns:
        column.validate()
        kind = _as_bytes(column.type)
        (column if kind == column.type else column.view(kind)).validate(full=True)


def _as_bytes(kind: Any) -> Any:
    """A type with bytes for text."""
    types = pa.types
    if types.is_string(kind):
        return pa.binary()
    if types.is_large_string(kind):
        return pa.large_binary()
    if types.is_string_view(kind):
        return pa.binary_view()
    if types.is_struct(kind):
        return pa.struct([f.with_type(_as_bytes(f.type)) for f in (kind.field(i) for i in range(kind.num_fields))])
    if types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_as_bytes(kind.value_type)))
    if types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_as_bytes(kind.value_type)))
    return kind


def _check_end(raw: io.BufferedReader, file: CorpusFile) -> None:
    """Whether a stream that was read ends as streams end, and the file with it.

    Raises:
        EOFError: it does not, and may have been cut between two record batches.
        DataError: something follows it.
    """
    stop = raw.tell()
    raw.seek(max(0, stop - len(_END)))
    if raw.read(len(_END)) != _END:
        raise EOFError
    if raw.read(1):
        raise DataError(
            f"data.files must hold one Arrow stream each, but {file} goes on after its end at byte {stop}; "
            "write one file for each"
        )
