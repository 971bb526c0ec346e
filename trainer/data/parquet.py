"""Texts of .parquet files: columns of text or of UTF-8 bytes, nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from regrow.trainer.data.corpus_files import NULL_TEXT, check_regular, reading
from regrow.trainer.data.source import DataError, Notes, shown

__all__ = ["read_row_group", "row_groups"]

# Of rows in memory at once, as their average says.
_BATCH_BYTES = 8 << 20
_BATCH_ROWS = 1024


@contextmanager
def _arrow_reading(path: Path) -> Iterator[None]:
    """See `reading`; Arrow's own errors too."""
    with reading(path):
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            reason = shown(" ".join(str(error).split()))
            raise DataError(f"data.files must be sound, but {path} is no whole Parquet file ({reason})") from error


def row_groups(path: Path, field: str) -> int:
    """The number of row groups of a file whose column `field` is text.

    Raises:
        DataError: it is no such file.
    """
    with _arrow_reading(path):
        file = _open(path)
        _check_column(file.schema_arrow, field, path)
        return int(file.num_row_groups)


def _batch_rows(group: Any) -> int:
    """How many rows of a row group to read at once."""
    average = int(group.total_byte_size) // max(1, int(group.num_rows))
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, average)))


def _open(path: Path, dictionary: str | None = None) -> Any:
    check_regular(path)
    # As a dictionary: a small file may repeat one long text by a number for it.
    return pq.ParquetFile(
        path,
        page_checksum_verification=True,
        pre_buffer=False,
        read_dictionary=None if dictionary is None else [dictionary],
    )


def _check_column(schema: Any, field: str, path: Path) -> None:
    """Whether there is one column of the name, of a type that holds text."""
    if schema.names.count(field) != 1:
        names = ", ".join(schema.names[:40])
        found = "is a name of several" if field in schema.names else "is none"
        raise DataError(
            f"data.field must be a column of {path} ({shown(names)}), but {field!r} {found}; set data.field"
        )
    kind = schema.field(field).type
    stored = kind.value_type if pa.types.is_dictionary(kind) else kind
    tests = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_null,
        *(getattr(pa.types, n) for n in ("is_string_view", "is_binary_view") if n in dir(pa.types)),
    )
    if not any(test(stored) for test in tests):
        raise DataError(
            f"data.field must be a column of text, but {field!r} in {path} is of type {shown(str(kind))}; "
            "set data.field or convert it"
        )


def read_row_group(path: Path, group: int, field: str, notes: Notes) -> Iterator[str]:
    """The texts of one row group.

    Raises:
        DataError: naming the file and row.
    """
    with _arrow_reading(path):
        file = _open(path, field)
        _check_column(file.schema_arrow, field, path)
        row = sum(file.metadata.row_group(g).num_rows for g in range(group))
        rows = _batch_rows(file.metadata.row_group(group))
        for batch in file.iter_batches(batch_size=rows, row_groups=[group], columns=[field]):
            for scalar in batch.column(batch.schema.names.index(field)):
                row += 1
                text = _text_of(scalar, path, row, field, notes)
                if text:
                    yield text


def _text_of(scalar: Any, path: Path, row: int, field: str, notes: Notes) -> str | None:
    """A value's text; bytes are UTF-8, as Spark, Impala and Hive write them."""
    try:
        value = scalar.as_py()
        text = value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        raise DataError(
            f"data.files must be UTF-8, but {field!r} in row {row} of {path} is not "
            f"(byte {error.start + 1}: {error.reason}); convert or remove it"
        ) from None
    if text is None:
        notes.add(NULL_TEXT, lambda: f"row {row} of {path}")
        return None
    assert isinstance(text, str), "the column's type was looked at"
    return text
