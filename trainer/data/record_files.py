"""Reading records of .jsonl, Parquet and Arrow files: JSON objects, each with its place."""

from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

from regrow.trainer.data import json_lines
from regrow.trainer.data.corpus_paths import CorpusFile, ending_of, open_file
from regrow.trainer.data.records import BadRecords, Record
from regrow.trainer.data.source import CorpusPart

__all__ = ["read_records", "record_parts", "table_of"]

_TABLES = {".parquet": "parquet", ".arrow": "arrow_files"}


def table_of(file: CorpusFile) -> Any | None:
    """The module that reads a table (`schema`, `parts`, `read`); None for lines of JSON."""
    name = _TABLES.get(ending_of(file))
    # Arrow is heavy, and most corpora do without.
    return None if name is None else import_module(f"regrow.trainer.data.{name}")


def record_parts(file: CorpusFile) -> list[CorpusPart]:
    """A file of records in parts that are read one by one; none of an empty file.

    Raises:
        DataError: it cannot be read.
    """
    table = table_of(file)
    parts: list[CorpusPart] = json_lines.parts(file) if table is None else table.parts(file)
    return parts


def read_records(part: CorpusPart, bad: BadRecords, columns: Sequence[str] | None = None) -> Iterator[Record]:
    """The records of a part of a file.

    Args:
        part: of a .jsonl (.gz, .zst, .bz2, .xz), .parquet or .arrow file, its path as `find_files` names it; the
            whole file with start 0 and stop -1.
        bad: told of those that are no records.
        columns: of a table, those that are read, by their names at the top; None is all.

    Raises:
        DataError: naming the file and the line or row; it is damaged, or `bad` does not pass over what is wrong.
    """
    file = open_file(part.path)
    table = table_of(file)
    if table is None:
        return json_lines.read(file, part.start, part.stop, bad)
    records: Iterator[Record] = table.read(file, part.start, part.stop, columns, bad)
    return records
