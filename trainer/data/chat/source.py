"""Conversations in files: rendered by the tokenizer's own template, with labels where the assistant speaks."""

import hashlib
import logging
from collections.abc import Iterator
from datetime import datetime
from itertools import islice
from typing import Any, ClassVar, final

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from regrow.trainer.data.chat.conversation import RECORD_FIELDS, Conversation, conversation_of
from regrow.trainer.data.chat.labels import encode_conversation
from regrow.trainer.data.chat.template import ChatTemplate
from regrow.trainer.data.chat.template_files import read_chat_template
from regrow.trainer.data.config import ChatConfig, OnBadRecord, Packing
from regrow.trainer.data.corpus_content import files_content
from regrow.trainer.data.corpus_files import reading
from regrow.trainer.data.corpus_paths import ENDINGS, ending_of, find_files, open_file
from regrow.trainer.data.encoding import DocumentMarks, Encoded
from regrow.trainer.data.record_files import read_records, record_parts, table_of
from regrow.trainer.data.records import BadRecordError, BadRecords, Record, sound
from regrow.trainer.data.selection import Filters
from regrow.trainer.data.source import CorpusPart, CorpusSource, DataError, Notes, digest
from regrow.trainer.data.tokenizer import tokenizer_file

__all__ = ["ChatSource"]

log = logging.getLogger(__name__)

# Records that are looked at before anything is tokenised.
_FIRST_RECORDS = 20
_NO_LABEL = "conversation without a label, left out"


@final
class ChatSource(CorpusSource):
    """See `ChatConfig`."""

    HAS_LABELS: ClassVar[bool] = True
    config: ChatConfig

    def check(self) -> None:
        config = self.config
        if not config.files:
            raise DataError("data.files must name at least one file or glob, but is []; use data.files=[chats.jsonl]")
        if config.tokenizer is None:
            raise DataError(
                "data.tokenizer must be a folder with a chat template for conversations, but is null; use the folder "
                "of the model that you start from"
            )
        if config.packing is not Packing.best_fit:
            raise DataError(
                f"data.packing must be best_fit for conversations, which would be cut anywhere, but is "
                f"{config.packing.name}; use data.packing=best_fit"
            )
        if config.max_bad_records < 0:
            raise DataError(f"data.max_bad_records must be at least 0, but is {config.max_bad_records}; use 1000")
        Filters(config)
        for file in find_files(config.files):
            if ending_of(file) in ("", ".txt"):
                allowed = ", ".join(e for e in ENDINGS if e != ".txt")
                raise DataError(f"data.files must end in one of {allowed}, but holds {file}; convert it first")
            with reading(file), file.open():
                pass
        self._template().check()

    def _template(self) -> ChatTemplate:
        """The tokenizer's.

        Raises:
            DataError: there is none, or the date is none.
        """
        config = self.config
        assert config.tokenizer is not None, "`check` has looked"
        date = None
        if config.template_date is not None:
            try:
                date = datetime.strptime(config.template_date, "%Y-%m-%d")
            except ValueError:
                raise DataError(
                    f"data.template_date must be a day as 2026-01-31, but is {config.template_date}; correct it"
                ) from None
        return read_chat_template(tokenizer_file(config.tokenizer).parent, name=config.template, date=date)

    def key(self) -> dict[str, str]:
        config = self.config
        files = find_files(config.files)
        key = {
            "the conversations": digest("chat", files_content(files, config), *map(ending_of, files)),
            "data.labels": config.labels.value,
            "the chat template": self._template().identity(),
            **Filters(config).key(),
        }
        if config.on_bad_record is not OnBadRecord.stop:
            key["data.on_bad_record"] = config.on_bad_record.value
        return key

    def units(self) -> list[CorpusPart]:
        units: list[CorpusPart] = []
        for file in find_files(self.config.files):
            parts = record_parts(file)
            if parts:
                # What is wrong with all of them is not found after hours.
                next(islice(self._conversations(CorpusPart(file.name), Notes()), _FIRST_RECORDS, None), None)
            else:
                log.warning("nothing is read from %s, which is empty", file)
            units += parts
        return units

    def read(self, unit: CorpusPart) -> Iterator[str]:
        """The conversations of one part as text."""
        template = self._template()
        yield from (template.render(c).text for _, c in self._conversations(unit, self.notes))

    def encode(self, unit: CorpusPart, tokenizer: Tokenizer, marks: DocumentMarks) -> Iterator[Encoded]:
        """The conversations of one part as ids; the template says how they begin and end, not `marks`."""
        template, bad = self._template(), self._bad(self.notes)
        for record, conversation in self._conversations(unit, self.notes, bad):
            where = record.place.__str__

            def note(what: str, where: Any = where) -> None:
                self.notes.add(what, where)

            try:
                ids, labels = encode_conversation(conversation, template, tokenizer, self.config.labels, note)
            except DataError as error:
                bad.meet(_bad_record("cannot be rendered or labelled", record, error))
                continue
            # The first token is never asked for.
            if not labels[1:].any():
                self.notes.add(_NO_LABEL, where)
                continue
            yield Encoded(ids, _content(ids, labels), labels)

    def _bad(self, notes: Notes) -> BadRecords:
        return BadRecords(notes, self.config.on_bad_record, self.config.max_bad_records)

    def _conversations(
        self, unit: CorpusPart, notes: Notes, bad: BadRecords | None = None
    ) -> Iterator[tuple[Record, Conversation]]:
        bad, filters = bad or self._bad(notes), Filters(self.config)
        for record in read_records(unit, bad, _columns(unit, filters)):
            if filters.leave_out(record, notes):
                continue
            try:
                conversation = conversation_of(sound(record.value, record.place, notes))
            except DataError as error:
                bad.meet(_bad_record("no conversation", record, error))
                continue
            yield record, conversation


def _columns(unit: CorpusPart, filters: Filters) -> list[str] | None:
    """The columns of a table that conversations and filters are in; None: the file is none."""
    file = open_file(unit.path)
    table = table_of(file)
    if table is None:
        return None
    wanted = {*RECORD_FIELDS, *filters.names, *(name.partition(".")[0] for name in filters.names)}
    return [name for name in table.schema(file).names if name in wanted]


def _bad_record(what: str, record: Record, error: DataError) -> BadRecordError:
    return BadRecordError(what, record.place, f"{record.place}: {error}")


def _content(ids: npt.NDArray[np.int64], labels: npt.NDArray[np.bool_]) -> int:
    hashed = hashlib.blake2b(ids.astype("<i8").tobytes(), digest_size=8)
    hashed.update(np.packbits(labels).tobytes())
    return int.from_bytes(hashed.digest(), "little")
