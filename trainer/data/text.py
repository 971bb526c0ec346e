"""Text files: .txt, .jsonl (plain, .gz, .zst, .bz2, .xz), .parquet and .arrow, here or behind URLs."""

import logging
from collections.abc import Iterator
from importlib import import_module
from itertools import islice
from typing import Any, final

from regrow.trainer.data.config import OnBadRecord, TextConfig
from regrow.trainer.data.corpus_content import files_content
from regrow.trainer.data.corpus_files import read_text, reading
from regrow.trainer.data.corpus_paths import ENDINGS, CorpusFile, ending_of, find_files, open_file
from regrow.trainer.data.record_files import read_records, record_parts, table_of
from regrow.trainer.data.records import BadRecordError, BadRecords
from regrow.trainer.data.selection import Selection
from regrow.trainer.data.source import CorpusPart, CorpusSource, DataError, Notes, digest

__all__ = ["TextSource"]

log = logging.getLogger(__name__)

# Records that are looked at before anything is tokenised.
_FIRST_RECORDS = 100


@final
class TextSource(CorpusSource):
    """See `TextConfig`."""

    config: TextConfig

    def check(self) -> None:
        config = self.config
        if not config.files:
            raise DataError("data.files must name at least one file or glob, but is []; use data.files=[a.txt]")
        selection = Selection(config)
        for file in find_files(config.files):
            if not ending_of(file):
                raise DataError(
                    f"data.files must end in one of {', '.join(ENDINGS)}, but holds {file}; convert it first"
                )
            if selection.filters and ending_of(file) == ".txt":
                raise DataError(
                    f"data.where must filter records, but {file} has none; name .txt files in a source of their own"
                )
            with reading(file), file.open():
                pass
        for name, value in (
            ("txt_document_bytes", config.txt_document_bytes),
            ("max_bad_records", config.max_bad_records),
        ):
            if value < 0:
                default = TextConfig.__dataclass_fields__[name].default
                raise DataError(f"data.{name} must be at least 0, but is {value}; use {default}")

    def key(self) -> dict[str, str]:
        config = self.config
        files = find_files(config.files)
        key = {
            "the text": digest("text", files_content(files, config), *map(ending_of, files)),
            "data.field": config.field,
            "data.txt_document_bytes": str(config.txt_document_bytes),
            **Selection(config).key(),
        }
        if config.on_bad_record is not OnBadRecord.stop:
            key["data.on_bad_record"] = config.on_bad_record.value
        return key

    def units(self) -> list[CorpusPart]:
        selection = Selection(self.config)
        units: list[CorpusPart] = []
        for file in find_files(self.config.files):
            parts = _parts(file)
            if parts:
                self._check_beginning(file, selection)
            else:
                log.warning("nothing is read from %s, which is empty", file)
            units += parts
        return units

    def _check_beginning(self, file: CorpusFile, selection: Selection) -> None:
        """Looks at the columns or the first records, so that a wrong field is not found after hours."""
        if ending_of(file) == ".txt":
            next(read_text(file, 1), None)
        elif table_of(file) is not None:
            _columns(file, selection)
        else:
            first = islice(self._texts(CorpusPart(file.name), selection, Notes()), _FIRST_RECORDS)
            next((text for text in first if text), None)

    def read(self, unit: CorpusPart) -> Iterator[str]:
        file = open_file(unit.path)
        if ending_of(file) == ".txt":
            yield from read_text(file, self.config.txt_document_bytes)
        else:
            yield from (text for text in self._texts(unit, Selection(self.config), self.notes) if text)

    def _texts(self, unit: CorpusPart, selection: Selection, notes: Notes) -> Iterator[str | None]:
        """Each record's text, or None."""
        bad = BadRecords(notes, self.config.on_bad_record, self.config.max_bad_records)
        for record in read_records(unit, bad, _columns(open_file(unit.path), selection)):
            text: str | None = None
            try:
                text = selection.text(record, notes)
            except BadRecordError as error:
                bad.meet(error)
            yield text


def _parts(file: CorpusFile) -> list[CorpusPart]:
    """The parts that are tokenised one by one."""
    if ending_of(file) != ".txt":
        return record_parts(file)
    with reading(file):
        return [CorpusPart(file.name, 0, 64 << 20)] if file.size() else []


def _columns(file: CorpusFile, selection: Selection) -> list[str] | None:
    """The columns of a table in which the text and the filters lie; None: the file is none.

    Raises:
        DataError: one is not there, or that of the text is of another type.
    """
    table = table_of(file)
    if table is None:
        return None
    # Arrow is heavy, and most corpora do without.
    rows: Any = import_module("regrow.trainer.data.arrow_rows")
    columns: list[str] = rows.chosen_columns(
        table.schema(file), file, selection.option, selection.fields, selection.filters
    )
    return columns
