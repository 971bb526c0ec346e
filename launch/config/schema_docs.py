"""What schemas say about themselves: the one parser of their docstrings. Loads nothing but what it is given.

A field's meaning stands under `Attributes:` of its dataclass, or of the one that it inherits the field from; a
choice's under `Attributes:` of its enum.
"""

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

__all__ = [
    "REQUIRED",
    "FieldDoc",
    "SchemaDoc",
    "attribute_texts",
    "describe_schema",
    "plain",
    "summary_of",
    "words_for",
]

# A default that is none: the field must be set.
REQUIRED = "???"
_HEADING = re.compile(r"(Args|Attributes|Returns|Raises|Yields|Example|Examples|Note|Notes):\s*$")
_ITEM = re.compile(r"(\w+(?:, \w+)*): +(.*)$")
_WORDS: dict[Any, tuple[str, str]] = {
    int: ("whole number", "whole numbers"),
    float: ("number", "numbers"),
    bool: ("true or false", "values true or false"),
    str: ("text", "texts"),
    Any: ("any value", "values"),
}


@dataclass(frozen=True, slots=True)
class FieldDoc:
    """One field.

    Attributes:
        name: its own, without the section's.
        meaning: from the docstring, on one line; empty where there is none.
        type_words: what may be written for it.
        default: as plain values; `REQUIRED` where there is none.
        members: of an enum, or of what a list holds: (name, meaning).
        section: the dataclass that its own fields are those of, or that of each of its entries.
        per_entry: it holds any number of such sections, `named` or in a list.
        named: they have names.
    """

    name: str
    meaning: str
    type_words: str
    default: Any
    members: tuple[tuple[str, str], ...] = ()
    section: type[Any] | None = None
    per_entry: bool = False
    named: bool = False


@dataclass(frozen=True, slots=True)
class SchemaDoc:
    """One dataclass.

    Attributes:
        summary: what stands before its fields, on one line.
        fields: in order.
    """

    summary: str
    fields: tuple[FieldDoc, ...]

    def __getitem__(self, name: str) -> FieldDoc:
        return next(f for f in self.fields if f.name == name)


_described: dict[type[Any], SchemaDoc] = {}


def describe_schema(kind: type[Any]) -> SchemaDoc:
    """Reads a dataclass, with what it inherits.

    Args:
        kind: the dataclass.
    """
    if kind not in _described:
        _described[kind] = _describe(kind)
    return _described[kind]


def _describe(kind: type[Any]) -> SchemaDoc:
    meanings: dict[str, str] = {}
    for parent in reversed(kind.__mro__):
        meanings |= attribute_texts(parent)
    try:
        hints = typing.get_type_hints(kind)
    except Exception:
        # A user's module may import a type for type checkers alone.
        hints = {}
    found = [_field(f, meanings.get(f.name, ""), hints.get(f.name, f.type)) for f in dataclasses.fields(kind)]
    return SchemaDoc(summary_of(kind), tuple(found))


def _docstring(kind: type[Any]) -> str:
    """A class' own docstring; that which `dataclass` or `Enum` makes up where there is none is none."""
    text = kind.__dict__.get("__doc__") or ""
    made_up = text.startswith(f"{kind.__name__}(") or text in ("An enumeration.", Enum.__doc__)
    return "" if made_up else inspect.cleandoc(text)


def summary_of(kind: type[Any]) -> str:
    """What a docstring says before its first list, on one line."""
    lines = []
    for line in _docstring(kind).splitlines():
        if _HEADING.match(line):
            break
        lines.append(line)
    return _one_line(lines)


def attribute_texts(kind: type[Any]) -> dict[str, str]:
    """What stands under `Attributes:`, each name with its text on one line."""
    lines = _docstring(kind).splitlines()
    start = next((i for i, line in enumerate(lines) if line.strip() == "Attributes:"), len(lines))
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in lines[start + 1 :]:
        if line and not line.startswith(" "):
            break
        item = _ITEM.match(line[4:]) if line.startswith("    ") else None
        if item is not None:
            current = [item.group(2)]
            found |= dict.fromkeys(item.group(1).split(", "), current)
        else:
            current.append(line)
    return {name: _one_line(text) for name, text in found.items()}


def _one_line(lines: list[str]) -> str:
    return " ".join(" ".join(lines).split())


def _field(field: "dataclasses.Field[Any]", meaning: str, kind: Any) -> FieldDoc:
    inner = _inner(kind)
    section = inner if isinstance(inner, type) and dataclasses.is_dataclass(inner) else None
    origin = typing.get_origin(kind)
    enum = inner if isinstance(inner, type) and issubclass(inner, Enum) else None
    return FieldDoc(
        name=field.name,
        meaning=meaning,
        type_words=words_for(kind),
        default=_default(field),
        members=_members(enum) if enum is not None else (),
        section=section,
        per_entry=section is not None and origin in (list, dict),
        named=section is not None and origin is dict,
    )


def _inner(kind: Any) -> Any:
    """The one class that a type is made of: of an optional one, of a list's elements, of a mapping's values."""
    arguments = [a for a in typing.get_args(kind) if a is not type(None)]
    return _inner(arguments[-1]) if arguments else kind


def _members(kind: type[Enum]) -> tuple[tuple[str, str], ...]:
    texts = attribute_texts(kind)
    return tuple((name, texts.get(name, "")) for name in kind.__members__)


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default is not dataclasses.MISSING:
        return plain(field.default)
    return REQUIRED if field.default_factory is dataclasses.MISSING else plain(field.default_factory())


def plain(value: Any) -> Any:
    """A default as YAML has it: enums by their names, dataclasses as mappings."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, type):
        return value.__qualname__
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(child) for key, child in value.items()}
    return [plain(child) for child in value] if isinstance(value, list | tuple) else value


def words_for(kind: Any) -> str:
    """A type in words.

    Args:
        kind: as a field is annotated with it.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        given = [words_for(a) for a in arguments if a is not type(None)]
        *first, last = [*given, *(["null"] if type(None) in arguments else [])]
        return f"{', '.join(first)} or {last}" if first else last
    if origin is list:
        return f"list of {_plural(arguments[0])}"
    if origin is dict:
        return f"mapping from names to {_plural(arguments[1])}"
    if kind in _WORDS:
        return _WORDS[kind][0]
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"one of {', '.join(kind.__members__)}"
    return "section" if isinstance(kind, type) and dataclasses.is_dataclass(kind) else str(kind)


def _plural(kind: Any) -> str:
    if kind in _WORDS:
        return _WORDS[kind][1]
    return (
        "sections" if isinstance(kind, type) and dataclasses.is_dataclass(kind) else f"values, each {words_for(kind)}"
    )
