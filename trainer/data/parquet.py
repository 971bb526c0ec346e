"""Records of .parquet files, a row group at a time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from regrow.trainer.data.arrow_rows import arrow_reading, check_columns, records_of
from regrow.trainer.data.corpus_files import Cursor
from regrow.trainer.data.corpus_paths import CorpusFile
from regrow.trainer.data.records import EMPTY_FILE, BadRecords, Record
from regrow.trainer.data.source import CorpusPart

__all__ = ["parts", "read", "schema"]

# Of rows in memory at once, as their average says.
_BATCH_BYTES = 8 << 20
_BATCH_ROWS = 1024


def parts(file: CorpusFile) -> list[CorpusPart]:
    """The row groups.

    Raises:
        DataError: it is no such file.
    """
    with arrow_reading(file, "Parquet"), _open(file) as parquet:
        return [CorpusPart(file.name, g, g + 1) for g in range(parquet.num_row_groups)]


def schema(file: CorpusFile) -> Any:
    """The file's columns, as Arrow's schema.

    Raises:
        DataError: it is no such file.
    """
    with arrow_reading(file, "Parquet"), _open(file) as parquet:
        return parquet.schema_arrow


def read(file: CorpusFile, start: int, stop: int, columns: Sequence[str] | None, bad: BadRecords) -> Iterator[Record]:
    """The rows of the row groups [start, stop).

    Args:
        file: the file.
        start: a row group.
        stop: a row group; -1 is the end.
        columns: that are read, by their names at the top; None is all.
        bad: told of rows that cannot be used.

    Raises:
        DataError: naming the file and row.
    """
    cursor = Cursor(file, "row")
    with arrow_reading(file, "Parquet"), _open(file, columns, texts_once=True) as parquet:
        wanted = parquet.schema_arrow.names if columns is None else columns
        check_columns(parquet.schema_arrow, wanted, file)
        metadata = parquet.metadata
        cursor.nth = sum(metadata.row_group(g).num_rows for g in range(start))
        for group in range(start, metadata.num_row_groups if stop < 0 else stop):
            rows = _batch_rows(metadata.row_group(group))
            for batch in parquet.iter_batches(batch_size=rows, row_groups=[group], columns=list(wanted)):
                yield from records_of(batch, cursor, bad)
        if metadata.num_rows == 0:
            bad.notes.add(EMPTY_FILE, file.__str__)


def _batch_rows(group: Any) -> int:
    """How many rows of a row group to read at once."""
    average = int(group.total_byte_size) // max(1, int(group.num_rows))
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, average)))


@contextmanager
def _open(file: CorpusFile, columns: Sequence[str] | None = None, *, texts_once: bool = False) -> Iterator[Any]:
    """The file, open.

    Args:
        file: the file.
        columns: that will be read; None is all.
        texts_once: a small file may repeat one long text by a number for it; it is then in memory once.
    """
    with file.open() as raw:
        parquet = pq.ParquetFile(pa.PythonFile(raw, mode="r"), page_checksum_verification=True, pre_buffer=False)
        if texts_once:
            parquet = pq.ParquetFile(
                pa.PythonFile(raw, mode="r"),
                metadata=parquet.metadata,
                page_checksum_verification=True,
                pre_buffer=False,
                read_dictionary=_texts(parquet, columns),
            )
        yield parquet


def _texts(parquet: Any, columns: Sequence[str] | None) -> list[str]:
    """The paths of what holds text or bytes in some columns, nested ones included."""
    leaves = [parquet.schema.column(i) for i in range(len(parquet.schema))]
    return [
        leaf.path
        for leaf in leaves
        if leaf.physical_type == "BYTE_ARRAY"
        and leaf.logical_type.type in ("STRING", "NONE")
        and (columns is None or any(leaf.path == c or leaf.path.startswith(f"{c}.") for c in columns))
    ]
