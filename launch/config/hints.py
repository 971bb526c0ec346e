"""What somebody may have meant: near names, fields of another section, quotes for Hydra's grammar."""

import dataclasses
import difflib
import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from regrow.launch.config.package_schemas import known_schemas
from regrow.launch.config.schema import Config

__all__ = ["nearest", "one_line", "quoted_override", "unknown_choice", "unknown_field"]

# Below it a name is another one, not a misspelt one: `fp16` beside `fp64`.
_NEAR = 0.78
# Groups whose choices are entries of a section.
_ENTRIES = {
    "hook": "hooks",
    "save_policy": "checkpoint.save_policies",
    "retention_rule": "checkpoint.retention_rules",
}


def nearest(word: str, known: Sequence[str]) -> str | None:
    """The known name that a word misspells: one with the same letters, else the most similar one."""
    same = [k for k in known if sorted(k) == sorted(word)]
    return next(iter(same or difflib.get_close_matches(word, known, 1, _NEAR)), None)


def one_line(message: str) -> str:
    """A message of Hydra's or OmegaConf's with all that it says, but for their notes on types."""
    lines = [line.strip() for line in message.splitlines()]
    kept = [
        x for x in lines if x and not x.startswith(("full_key:", "object_type=", "reference_type=", "set env var"))
    ]
    return "; ".join(x.rstrip(";. ") for x in kept)


def _fields() -> Iterator[tuple[str, str]]:
    """(dotted name, choice that it belongs to as `group=choice`, or nothing) of all fields that schemas have."""
    for section in dataclasses.fields(Config):
        if dataclasses.is_dataclass(section.type):
            yield from ((f"{section.name}.{f.name}", "") for f in dataclasses.fields(section.type))
    for (group, name), kind in known_schemas().items():
        choice = name.removesuffix("_schema")
        prefix = f"{_ENTRIES[group]}.{choice}" if group in _ENTRIES else group
        belongs = "" if group in _ENTRIES else f"{group}={choice}"
        yield from ((f"{prefix}.{f.name}", belongs) for f in dataclasses.fields(kind))


def unknown_field(full_key: str, known: Sequence[str]) -> str:
    """The sentence for a name that the config does not have.

    Args:
        full_key: dotted.
        known: the names that its section has.
    """
    section, _, key = full_key.rpartition(".")
    prefix = f"{section}." if section else ""
    everywhere: dict[str, set[str]] = {}
    for name, choice in _fields():
        everywhere.setdefault(name, set()).add(choice)
    choices = everywhere.get(full_key, {""}) - {""}
    if choices and "" not in everywhere[full_key]:
        return f"{full_key} is a field of {' and '.join(sorted(choices))} alone; add {min(choices)} or leave it out"
    near = nearest(key, known)
    if near is not None:
        return f"{full_key} is not a field; did you mean {prefix}{near}?"
    others = sorted(n for n in everywhere if re.search(rf"[._]{re.escape(key)}$", n))
    if others:
        return f"{full_key} is not a field; did you mean {' or '.join(others[:4])}?"
    return f"{full_key} is not a field; {section or 'the config'} has {', '.join(known)}"


def unknown_choice(group: str, choice: str, names: Sequence[str]) -> str:
    """The sentence for a choice that a group does not have.

    Args:
        group: for instance `model`.
        choice: what was given.
        names: the choices that there are.
    """
    near = nearest(choice, names)
    remedy = f"did you mean {group}={near}?" if near else "choose one of them"
    if group == "experiment" and near is None:
        remedy = f"choose one of them, or give --config-dir=DIR with DIR/experiment/{choice}.yaml in it"
    return f"{group} must be one of {', '.join(names)}, but is {choice!r}; {remedy}"


def section_fields(section: str) -> list[str]:
    """The fields of a section, in order."""
    return list(dict.fromkeys(n for n, _ in _fields() if n.rpartition(".")[0] == section))


def quoted_override(override: str) -> str | None:
    """The override, quoted for Hydra's grammar and for a shell; None where quotes do not help."""
    key, equals, value = override.partition("=")
    if not equals:
        return None
    inner = value.strip().removeprefix("[").removesuffix("]")
    items = ",".join(_quoted(item.strip()) for item in re.split(r",(?![^\[\]]*\])", inner) if item.strip())
    forms = [f"{key}=[{items}]"] if value.startswith("[") and items else [f"{key}={_quoted(value)}"]
    for form in forms:
        try:
            OverridesParser.create().parse_override(form)
        except (HydraException, ValueError):
            continue
        return shlex.quote(form)
    return None


def _quoted(text: str) -> str:
    """In double quotes, which a shell's single quotes leave alone."""
    if re.fullmatch(r"'[^']*'|\"[^\"]*\"|[\w./*-]+", text, flags=re.ASCII):
        return text
    escaped = text.strip("'\"").replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def example_of(value: Any) -> str:
    """A value as a whole number, where it is one written otherwise."""
    try:
        number = float(str(value))
    except ValueError:
        return "VALUE"
    return str(int(number)) if number.is_integer() and abs(number) < 1e15 else "VALUE"
