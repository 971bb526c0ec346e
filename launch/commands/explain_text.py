"""Explanations as text for people. Pure."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["WIDTH", "as_page", "default_words", "sentence", "value_words", "wrapped"]

WIDTH = 100
_LABEL = 10
# What a field is for a run, in words.
MEMBERSHIPS = {
    "identity": "identity: never changes within a run; another value is another run",
    "hyperparameter": "hyperparameter: changes within a run only with run.allow_change=[{name}]",
    "location": "location: may change; what lies there may not (its fingerprint is compared)",
    "free": "free: may change at every start of the same run",
}
_SHOWN_CHOICES = 24


def as_page(explanations: Sequence[Mapping[str, Any]]) -> str:
    """Several explanations, one below the other.

    Args:
        explanations: as `explain_name` gives them.
    """
    return "\n\n".join("\n".join(_lines(e)) for e in explanations) + "\n"


def _lines(explained: Mapping[str, Any]) -> Iterable[str]:
    if explained["kind"] == "field":
        return _field(explained)
    return _choice(explained) if explained["kind"] == "choice" else _group(explained)


def _field(explained: Mapping[str, Any]) -> Iterable[str]:
    yield explained["name"]
    yield from wrapped(sentence(explained["meaning"]), "  ")
    for choice, meaning in explained.get("other_meanings", {}).items():
        yield from wrapped(f"{choice}: {meaning}", "    ")
    yield from _labelled("type", explained["type"])
    if not explained["has_fields"]:
        yield from _labelled("default", default_words(explained))
    for i, choice in enumerate(explained["choices"]):
        yield from _labelled("" if i else "choices", f"{choice['name']}: {choice['meaning']}")
    if "only_with" in explained:
        yield from _labelled("of", explained["only_with_words"])
    if explained.get("set_by"):
        given = [f"{name}: {value_words(value)}" for name, value in explained["set_by"].items()]
        more = [f"and {len(given) - _SHOWN_CHOICES} more"] if len(given) > _SHOWN_CHOICES else []
        yield from _labelled("set by", ", ".join([*given[:_SHOWN_CHOICES], *more]))
    yield from _labelled("in a run", MEMBERSHIPS[explained["belongs_to"]].format(name=explained["name"]))
    if "entries_of" in explained:
        group, choices = explained["entries_of"]["group"], explained["entries_of"]["choices"]
        add = f"regrow +{group}@{explained['name']}.NAME=CHOICE, of {', '.join(choices)}; see regrow explain {group}"
        yield from _labelled("set it", add)
    elif not explained["has_fields"]:
        yield from _labelled("set it", _where(explained))


def _where(explained: Mapping[str, Any]) -> str:
    name, value = explained["name"], "[A,B]" if explained["type"].startswith("list") else "VALUE"
    if ".N." in name:
        place, _, inside = name.partition(".N.")
        return f"with all of its list: regrow '{place}=[{{{inside}: {value}, …}}, …]'"
    is_swept = explained["belongs_to"] != "free" and value == "VALUE"
    sweep = f", or several: regrow -m {name}=A,B" if is_swept else ""
    *sections, last = name.split(".")
    nested = "".join(f"{section}: {{" for section in sections) + f"{last}: {value}" + "}" * len(sections)
    return f"regrow {name}={value}{sweep}; in the YAML of an experiment as {nested}"


def default_words(explained: Mapping[str, Any]) -> str:
    """A field's default, and what sets it.

    Args:
        explained: the field.
    """
    if explained["required"]:
        return "none; it must be set"
    own = explained.get("schema_defaults", {})
    if explained["name"].endswith("._target_") and not explained["in_default_config"]:
        return "that of the choice"
    values = list(dict.fromkeys(map(value_words, own.values())))
    if not explained["in_default_config"] and len(values) == 1:
        return values[0]
    by_schema = "; ".join(f"{v} with {', '.join(n for n, o in own.items() if value_words(o) == v)}" for v in values)
    if not explained["in_default_config"]:
        return by_schema
    where = f" (in {explained['default_set_by']})" if explained["default_set_by"] else ""
    return f"{value_words(explained['default'])}{where}" + (f"; {by_schema}" if by_schema else "")


def _group(explained: Mapping[str, Any]) -> Iterable[str]:
    yield explained["name"]
    yield from wrapped(sentence(explained["meaning"]), "  ")
    if explained["choices"]:
        yield ""
        yield f"  {_how_to_choose(explained)}"
        width = max(len(c["name"]) for c in explained["choices"]) + 2
        for choice in explained["choices"]:
            yield from wrapped(choice["meaning"], f"    {choice['name']:{width}}", 4 + width)
    if explained["fields"]:
        yield ""
        yield "  Fields"
        yield from _short(explained["fields"])


def _how_to_choose(explained: Mapping[str, Any]) -> str:
    name, place = explained["name"], explained["place"]
    if "NAME" in place:
        example = place.replace("NAME", "CHOICE" if name == "hook" else "NAME")
        return f"Add one with +{name}@{example}=CHOICE, of"
    none = "" if name != "experiment" else " (none unless one is chosen)"
    chosen = f" (default {explained['chosen']})" if explained["chosen"] else none
    return f"Choose one with {name}=CHOICE{chosen}, of"


def _short(fields: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """A line for each field, and more where its meaning needs them."""
    for field in fields:
        default = "" if field["has_fields"] else f" = {_short_default(field)}"
        yield f"    {field['name']}{default}"
        yield from wrapped(sentence(field["meaning"]), "        ")


def _short_default(field: Mapping[str, Any]) -> str:
    if field["required"]:
        return "(must be set)"
    if field["name"].endswith("._target_") and not field["in_default_config"]:
        return "(that of the choice)"
    own = list(field.get("schema_defaults", {}).values())
    return value_words(field["default"] if field["in_default_config"] or not own else own[0])


def _choice(explained: Mapping[str, Any]) -> Iterable[str]:
    yield f"{explained['name']}  ({explained['file']})"
    yield from wrapped(explained["meaning"], "  ")
    if explained["about"] not in ("", explained["meaning"]):
        yield from wrapped(explained["about"], "  ")
    yield ""
    yield f"  {explained['how']}"
    if explained["adds"]:
        yield ""
        yield "  Adds"
        yield from (f"    {line}" for line in explained["adds"])
    if explained["sets"]:
        yield ""
        yield "  Sets"
        yield from (f"    {name} = {value_words(value)}" for name, value in explained["sets"].items())
    rest = [f for f in explained["fields"] if f["name"] not in explained["sets"]]
    if rest:
        yield ""
        yield "  Leaves at the schema's defaults" if explained["sets"] else "  Fields"
        yield from _short(rest)


def value_words(value: Any) -> str:
    """A value as it is written on the command line.

    Args:
        value: plain.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(value_words(v) for v in value)}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {value_words(v)}" for k, v in value.items()) + "}"
    if isinstance(value, str):
        return repr(value) if value == "" or not value.isprintable() else value
    return str(value)


def sentence(text: str) -> str:
    """A meaning as a sentence of its own; names of things in code keep their letters.

    Args:
        text: on one line.
    """
    first = text.partition(" ")[0].rstrip(".,;:")
    if first[:1].islower() and not set(first) & set("._`="):
        text = f"{text[:1].upper()}{text[1:]}"
    return text if not text or text.endswith((".", ":")) else f"{text}."


def _labelled(label: str, text: str) -> Iterable[str]:
    return wrapped(text, f"  {label:{_LABEL}}", _LABEL + 2)


def wrapped(text: str, first: str, indent: int | None = None) -> list[str]:
    """A text in lines of at most `WIDTH`, its names and flags whole.

    Args:
        text: on one line.
        first: stands before the first line.
        indent: spaces before the others; None takes as many as `first` is long.
    """
    later = " " * (len(first) if indent is None else indent)
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=later, break_long_words=False, break_on_hyphens=False
    )
