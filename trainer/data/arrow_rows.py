"""What Parquet and Arrow files have in common: their errors, columns of text, and rows as records."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from regrow.trainer.data.corpus_files import Cursor, reading
from regrow.trainer.data.corpus_paths import CorpusFile
from regrow.trainer.data.records import BadRecordError, BadRecords, Record
from regrow.trainer.data.source import DataError, shown

__all__ = ["arrow_reading", "check_columns", "chosen_columns", "records_of"]


@contextmanager
def arrow_reading(file: CorpusFile, kind: str, cursor: Cursor | None = None) -> Iterator[None]:
    """See `reading`; Arrow's own errors too.

    Args:
        file: the file.
        kind: of it, as a person calls it.
        cursor: at the last row that was read.
    """
    with reading(file, cursor):
        try:
            yield
        # Damage may lie in a name of the schema, or in a length, for which there is never enough memory.
        except (pa.ArrowException, OSError, UnicodeDecodeError, MemoryError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            reason = shown(" ".join(str(error).split()) or "it asks for more memory than there is")
            raise DataError(f"data.files must be sound, but {file} is no whole {kind} file ({reason})") from error


def _is_text(kind: Any) -> bool:
    """Whether a type of Arrow holds text, UTF-8 bytes included, as Spark, Impala and Hive write them."""
    stored = kind.value_type if pa.types.is_dictionary(kind) else kind
    tests = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_null,
        *(getattr(pa.types, n) for n in ("is_string_view", "is_binary_view") if n in dir(pa.types)),
    )
    return any(test(stored) for test in tests)


def _column_of(schema: Any, path: str) -> str:
    """The column at the top in which a field lies: of its name, or of the first part of a dotted one."""
    return path if path in schema.names else path.split(".")[0]


def check_columns(schema: Any, columns: Sequence[str], file: CorpusFile, option: str = "data.field") -> None:
    """Whether there is one column of each name.

    Args:
        schema: of the file.
        columns: names at the top.
        file: for the message.
        option: for the message, which named them.

    Raises:
        DataError: there is none, or several.
    """
    for name in columns:
        if schema.names.count(name) != 1:
            names = ", ".join(schema.names[:40])
            found = "is a name of several" if name in schema.names else "is none"
            raise DataError(
                f"{option} must be a column of {file} ({shown(names)}), but {name!r} {found}; set {option}"
            )


def _check_text_column(schema: Any, path: str, file: CorpusFile, option: str = "data.field") -> None:
    """Whether a field is a column of text, or lies in one of structs as a dotted path says. See `check_columns`.

    Raises:
        DataError: it is not there, or of another type.
    """
    column = _column_of(schema, path)
    if schema.names.count(column) != 1:
        check_columns(schema, [path], file, option)
    kind = schema.field(column).type
    for part in path.split(".")[1:] if column != path else []:
        if not pa.types.is_struct(kind) or kind.get_field_index(part) < 0:
            held = ", ".join(kind.field(i).name for i in range(min(kind.num_fields, 40))) or str(kind)
            raise DataError(
                f"{option} must lead to text, but {path!r} has no {part!r} in {file}, only {shown(held)}; "
                f"set {option}"
            )
        kind = kind.field(part).type
    if not _is_text(kind):
        raise DataError(
            f"{option} must be a column of text, but {path!r} in {file} is of type {shown(str(kind))}; "
            f"set {option} or convert it"
        )


def chosen_columns(
    schema: Any, file: CorpusFile, option: str, fields: Sequence[str], filters: Sequence[str]
) -> list[str]:
    """The columns at the top in which some fields lie.

    Args:
        schema: of the file.
        file: for messages.
        option: for messages, which named the text's fields.
        fields: of text, by name or dotted path.
        filters: of any type.

    Raises:
        DataError: one is not there, or should be text and is not.
    """
    for path in fields:
        _check_text_column(schema, path, file, option)
    for path in filters:
        if schema.names.count(_column_of(schema, path)) != 1:
            check_columns(schema, [path], file, "data.where")
    return list(dict.fromkeys(_column_of(schema, path) for path in (*fields, *filters)))


def records_of(batch: Any, cursor: Cursor, bad: BadRecords) -> Iterator[Record]:
    """The rows of a record batch, counted by `cursor`, each made only when it is asked for."""
    columns = list(zip(batch.schema.names, batch.columns, strict=True))
    for row in range(batch.num_rows):
        cursor.nth += 1
        try:
            value = {name: _value(column[row], name, cursor) for name, column in columns}
        except BadRecordError as error:
            bad.meet(error)
        else:
            yield Record(value, cursor.place())


def _value(scalar: Any, name: str, cursor: Cursor) -> Any:
    """A cell's value.

    Raises:
        BadRecordError: it is text that is not UTF-8, or a date or time that Python has none for.
    """
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        place = cursor.place()
        raise BadRecordError(
            "not UTF-8",
            place,
            f"data.files must be UTF-8, but {name!r} in {place} is not (byte {error.start + 1}: {error.reason}); "
            "convert or remove it",
        ) from None
    except (ValueError, OverflowError) as error:
        place = cursor.place()
        raise BadRecordError(
            "a value out of Python's range",
            place,
            f"data.files must hold values that Python has, but {name!r} in {place} is none "
            f"({shown(' '.join(str(error).split()))}); convert or remove it",
        ) from None
