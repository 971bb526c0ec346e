"""`python -m regrow.launch.commands.configuration_page`: the page docs/configuration.md, made from the schemas."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from regrow.launch.commands.explain_name import explain_all
from regrow.launch.commands.explain_text import default_words, sentence
from regrow.launch.commands.own_catalog import own_catalog

__all__ = ["configuration_page"]

_INTRODUCTION = """# Configuration

Every section, group and field, as `regrow explain` prints them. This page is made from the schemas: `make reference`
writes it anew.

A section's field is set with `section.field=value`, a group's choice with `group=choice`. What a field is for a run
stands in the column *in a run*:

| in a run | means |
|---|---|
| identity | it makes the run what it is and never changes within one; another value is another run |
| hyperparameter | it changes within a run only where `run.allow_change` names it |
| location | it says where something lies; what lies there may not change |
| free | it may change at every start of the same run |

In names, `NAME` is a name of your choice and `N` a place in a list. A default is the
one that a run has where no choice is made; `(in FILE)` names the file that sets it, where the schema does not.
"""


def configuration_page() -> str:
    """The whole page, of Regrow's own schemas and files."""
    explained = explain_all(own_catalog())
    lines = [_INTRODUCTION, "## Outside of sections", ""]
    lines += _table([e for e in explained if e["kind"] == "field"])
    shown = {e["name"] for e in explained if e["kind"] == "field"}
    for group in explained:
        if group["kind"] != "field":
            lines += ["", *_group(group, shown)]
    return "\n".join(lines) + "\n"


def _group(group: Mapping[str, Any], shown: set[str]) -> Iterable[str]:
    yield f"## {group['name']}"
    yield ""
    yield _escaped(sentence(group["meaning"]))
    yield ""
    if group["choices"]:
        yield f"| `{_choosing(group)}` | is |"
        yield "|---|---|"
        for choice in group["choices"]:
            chosen = " (default)" if choice["name"] == group["chosen"] else ""
            yield f"| `{choice['name']}`{chosen} | {_escaped(choice['meaning'])} |"
    fields = [f for f in group["fields"] if f["name"] not in shown]
    if group["choices"] and fields:
        yield ""
    if fields:
        yield from _table(fields)


def _choosing(group: Mapping[str, Any]) -> str:
    name, place = group["name"], group["place"]
    if "NAME" not in place:
        return f"{name}="
    return f"+{name}@{place}="


def _table(fields: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    yield "| field | type | default | in a run | meaning |"
    yield "|---|---|---|---|---|"
    for field in fields:
        default = "" if field["has_fields"] else f"{_escaped(default_words(field))}"
        cells = (f"`{field['name']}`", _escaped(field["type"]), default, field["belongs_to"], _meaning(field))
        yield f"| {' | '.join(cells)} |"


def _meaning(field: Mapping[str, Any]) -> str:
    parts = [sentence(field["meaning"])]
    parts += [f"With {name}: {sentence(meaning)}" for name, meaning in field.get("other_meanings", {}).items()]
    parts += [f"`{c['name']}`: {sentence(c['meaning'])}" for c in field["choices"]]
    if "only_with" in field:
        parts.append(f"Of {field['only_with_words']}.")
    return _escaped(" ".join(parts))


def _escaped(text: str) -> str:
    """For a cell of a table; code keeps its angle brackets."""
    parts = text.replace("|", "\\|").split("`")
    return "`".join(part if i % 2 else part.replace("<", "&lt;") for i, part in enumerate(parts))


if __name__ == "__main__":
    sys.stdout.write(configuration_page())
