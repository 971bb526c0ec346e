"""Which records' texts become documents: fields chosen and joined, records left out, all by config. Pure."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

from regrow.trainer.data.config import FileFields, TextConfig
from regrow.trainer.data.corpus_files import NULL_TEXT
from regrow.trainer.data.records import BadRecordError, Record, kind_of, sound
from regrow.trainer.data.source import DataError, Notes, shown

__all__ = ["Filters", "Selection"]

_MISSING = object()


@final
class Filters:
    """Which records are used; see `FileFields`.

    Attributes:
        names: the fields that decide it.

    Raises:
        DataError: a filter is none.
    """

    def __init__(self, config: FileFields) -> None:
        self._where = {name: _values(name, value) for name, value in _flat(config.where)}
        self._least = dict(config.where_min)
        self._most = dict(config.where_max)
        for option, bounds in (("where_min", self._least), ("where_max", self._most)):
            for name, bound in bounds.items():
                if not math.isfinite(bound):
                    raise DataError(f"data.{option}.{name} must be a finite number, but is {bound}; leave it out")
        for name, least in self._least.items():
            if name in self._most and least > self._most[name]:
                raise DataError(
                    f"data.where_min.{name} must be at most data.where_max.{name} ({self._most[name]}), but is "
                    f"{least}; no record could be used"
                )
        self.names: Sequence[str] = list(dict.fromkeys([*self._where, *self._least, *self._most]))

    def key(self) -> dict[str, str]:
        """What decides the documents, by the name that a message gives it; nothing where it is as by default."""
        chosen = (("where", self._where), ("where_min", self._least), ("where_max", self._most))
        return {f"data.{option}": json.dumps(values, sort_keys=True) for option, values in chosen if values}

    def leave_out(self, record: Record, notes: Notes) -> bool:
        """Whether a record is not used, which is then noted."""
        reason = self._left_out(record.value)
        if reason is not None:
            notes.add(reason, record.place.__str__)
        return reason is not None

    def _left_out(self, value: Mapping[str, Any]) -> str | None:
        """Why a record is not used; None: it is."""
        for name, allowed in self._where.items():
            found = _plain(_find(value, name))
            if not any(_equal(found, a) for a in allowed):
                return f"record left out by data.where.{name}" + _if_missing(found)
        for option, bounds, beyond in (("where_min", self._least, -1), ("where_max", self._most, 1)):
            for name, bound in bounds.items():
                found = _find(value, name)
                if not _is_number(found):
                    return f"record left out by data.{option}.{name}" + (_if_missing(found) or ", as it is no number")
                if not (found >= bound if beyond < 0 else found <= bound):
                    return f"record left out by data.{option}.{name}"
        return None


@final
class Selection:
    """See `TextConfig`.

    Attributes:
        option: the config's field that names the text.
        fields: of the text, joined in this order; dotted paths lead into nested objects.
        filters: the fields that decide whether a record is used.

    Raises:
        DataError: a filter is none.
    """

    def __init__(self, config: TextConfig) -> None:
        self.option = "data.fields" if config.fields else "data.field"
        self.fields: Sequence[str] = config.fields or [config.field]
        # As a command line has them, where Hydra leaves them.
        self._join = config.join.replace("\\n", "\n").replace("\\t", "\t")
        self._filters = Filters(config)
        self.filters = self._filters.names

    def key(self) -> dict[str, str]:
        """What decides the documents, by the name that a message gives it; nothing where it is as by default."""
        key: dict[str, str] = {}
        if self.option == "data.fields":
            key["data.fields"] = json.dumps(self.fields)
            if self._join != "\n\n" and len(self.fields) > 1:
                key["data.join"] = json.dumps(self._join)
        return key | self._filters.key()

    def text(self, record: Record, notes: Notes) -> str | None:
        """The document of a record; None: it has none, or is left out.

        Args:
            record: any.
            notes: told of what is left out, passed over or replaced.

        Raises:
            BadRecordError: a field of the text is missing or is no text.
        """
        if self._filters.leave_out(record, notes):
            return None
        texts = [self._text(record, name) for name in self.fields]
        if all(t is None for t in texts):
            notes.add(NULL_TEXT, record.place.__str__)
            return None
        joined: str = sound(self._join.join(t for t in texts if t), record.place, notes)
        return joined

    def _text(self, record: Record, name: str) -> str | None:
        """A field's text; bytes are UTF-8, as Spark, Impala and Hive write them."""
        text = _find(record.value, name)
        if isinstance(text, str) or text is None:
            return text
        place, option = record.place, self.option
        if text is _MISSING:
            names = ", ".join(map(repr, list(record.value)[:20])) or "none"
            raise BadRecordError(
                f"no field {name!r}",
                place,
                f"{option} must be a field of every record, but {place} has no {name!r}, only {shown(names)}; "
                f"set {option}",
            )
        if isinstance(text, bytes):
            try:
                return text.decode()
            except UnicodeDecodeError as error:
                raise BadRecordError(
                    "not UTF-8",
                    place,
                    f"data.files must be UTF-8, but {name!r} in {place} is not "
                    f"(byte {error.start + 1}: {error.reason}); convert or remove it",
                ) from None
        raise BadRecordError(
            f"a {kind_of(text)} instead of text",
            place,
            f"{option} must name text, but {name!r} in {place} is a {kind_of(text)}; set {option} or convert it",
        )


def _find(value: Mapping[str, Any], name: str) -> Any:
    """A field's value: of that very name, or where a dotted path leads; `_MISSING` where there is none.

    Below what is null all is null.
    """
    if name in value:
        return value[name]
    found: Any = value
    for part in name.split("."):
        if found is None:
            return None
        if not isinstance(found, Mapping) or part not in found:
            return _MISSING
        found = found[part]
    return found


def _flat(where: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested sections as dotted names, as Hydra's overrides make them."""
    for name, value in where.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _values(name: str, value: Any) -> list[Any]:
    """The values of a filter.

    Raises:
        DataError: they are not plain, or there is none.
    """
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not values or not all(v is None or isinstance(v, bool | int | float | str) for v in values):
        raise DataError(
            f"data.where.{name} must be a text, number, true, false or null, or a list of them, but is "
            f"{shown(str(value))}; correct it or leave it out"
        )
    return values


def _plain(value: Any) -> Any:
    """A value as filters have it: a missing one is null, bytes are text where they are UTF-8."""
    if value is _MISSING:
        return None
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _if_missing(value: Any) -> str:
    return ", as it is missing or null" if value is None or value is _MISSING else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _equal(found: Any, wanted: Any) -> bool:
    """Whether two values are the same in JSON: 1 is 1.0, and neither is true."""
    if _is_number(found) and _is_number(wanted):
        return bool(found == wanted)
    return type(found) is type(wanted) and found == wanted
