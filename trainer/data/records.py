"""What a record is, and what happens to a bad one."""

import re
from typing import Any, final

from msgspec import Struct

from regrow.trainer.data.config import OnBadRecord
from regrow.trainer.data.corpus_files import Place
from regrow.trainer.data.source import DataError, Notes

__all__ = ["EMPTY_FILE", "BadRecordError", "BadRecords", "Record", "kind_of", "sound"]

EMPTY_FILE = "file that holds no record"

# Halves that belong together were joined when the JSON was read.
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_SURROGATE = "half a surrogate pair in the text, replaced by U+FFFD"


class Record(Struct, frozen=True):
    """One JSON object, or row of a table.

    Attributes:
        value: its fields; of a table also bytes, dates and the like, as Arrow gives them to Python.
        place: where it is.
    """

    value: dict[str, Any]
    place: Place


@final
class BadRecordError(DataError):
    """One record cannot be used; the message is the whole explanation, which names its place.

    Attributes:
        what: kind, of few words, to count it by.
        place: where it is.
    """

    def __init__(self, what: str, place: Place, sentence: str) -> None:
        super().__init__(sentence)
        self.what = what
        self.place = place


@final
class BadRecords:
    """What happens to the bad records of one part of a file (see `CorpusPart`).

    Args:
        notes: told of each that is passed over.
        on_bad_record: whether they are.
        most: so many at most.
    """

    def __init__(self, notes: Notes, on_bad_record: OnBadRecord = OnBadRecord.stop, most: int = 0) -> None:
        self.notes = notes
        self._skip = on_bad_record is OnBadRecord.skip
        self._most = most
        self._met = 0

    def meet(self, error: BadRecordError) -> None:
        """Counts one, or raises.

        Raises:
            DataError: they are not passed over, or there are too many.
        """
        if not self._skip:
            raise error
        self._met += 1
        if self._met > self._most:
            raise DataError(
                f"data.max_bad_records must be at least the bad records of any part of a file, but is {self._most} "
                f"and one more is there: {error}; or raise data.max_bad_records"
            ) from error
        self.notes.add(f"bad record passed over: {error.what}", error.place.__str__)


def kind_of(value: object) -> str:
    """What JSON calls a value."""
    names = {dict: "JSON object", list: "list", bool: "true or false", int: "number", float: "number", str: "text"}
    return names.get(type(value), "null" if value is None else type(value).__name__)


def _is_unicode(text: str) -> bool:
    # Several times as fast as looking for halves of pairs.
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def sound(value: Any, place: Place, notes: Notes) -> Any:
    """A text, or a record's value with all texts in it, without halves of surrogate pairs, which no UTF-8 can hold.

    Args:
        value: as JSON has it.
        place: of its record.
        notes: told of a replacement.
    """
    if isinstance(value, str):
        if _is_unicode(value):
            return value
        notes.add(_SURROGATE, place.__str__)
        return _LONE_SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [sound(v, place, notes) for v in value]
    if isinstance(value, dict):
        return {sound(k, place, notes): sound(v, place, notes) for k, v in value.items()}
    return value
