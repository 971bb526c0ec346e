"""Which fields differ between runs, out of their overrides and configs. Pure."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["override_pairs", "swept_fields", "value_of"]

# What says where a run lives and how it is watched, not what it is.
_IGNORED = ("run", "hydra", "hooks", "hook", "logger", "wandb", "launch", "mode", "checkpoint")


def override_pairs(overrides: Sequence[str]) -> dict[str, str]:
    """Names and texts of the overrides that set something; the last of a name counts."""
    pairs = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        if equals:
            pairs[name.lstrip("+").partition("@")[0]] = text
    return pairs


def value_of(name: str, config: Mapping[str, Any], overrides: Mapping[str, str]) -> Any:
    """A field's value in a run: that of its config, else the text of its override (a group's choice), else None."""
    found: Any = config
    for part in name.replace("/", ".").split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    if isinstance(found, Mapping) or found is None:
        text = overrides.get(name, found.get("name") if isinstance(found, Mapping) else None)
        return _plain(text) if isinstance(text, str) else text
    if isinstance(found, list):
        return f"[{','.join(map(str, found))}]"
    return found if isinstance(found, str | int | float | bool) else str(found)


def swept_fields(runs: Sequence[tuple[Mapping[str, Any], Sequence[str]]]) -> dict[str, list[Any]]:
    """The fields that somebody set and that differ, each with its value in each run.

    Args:
        runs: of each its config as plain values, and its overrides.

    Returns:
        By field, in the order in which commands have them; the seed is last.
    """
    pairs = [override_pairs(overrides) for _, overrides in runs]
    names = dict.fromkeys(n for own in pairs for n in own if n.partition(".")[0].partition("/")[0] not in _IGNORED)
    found = {}
    for name in sorted(names, key=lambda n: n == "seed"):
        values = [value_of(name, config, own) for (config, _), own in zip(runs, pairs, strict=True)]
        if len({repr(v) for v in values}) > 1:
            found[name] = values
    return found


def _plain(text: str) -> str | int | float | bool:
    """An override's text as the value that a config would have of it."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    plain = re.sub(r"[\"' ]", "", text) if text.startswith("[") else text.strip("'\"")
    return {"true": True, "false": False}.get(text.lower(), plain)
