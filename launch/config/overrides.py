"""The command line's overrides, as far as they are looked at before Hydra composes a config."""

from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import OverrideParseException

__all__ = ["is_multirun", "parse_overrides", "swept_keys"]


def is_multirun(arguments: Sequence[str]) -> bool:
    """Whether the command is a sweep; `hydra/launcher=…` alone makes it a sweep of one."""
    return bool({"-m", "--multirun"} & set(arguments)) or any(
        a.lstrip("+").startswith("hydra/launcher=") or a.lower() == "hydra.mode=multirun" for a in arguments
    )


def parse_overrides(arguments: Sequence[str]) -> list[Override]:
    """Those that Hydra can read; it explains the others itself."""
    parser, found = OverridesParser.create(), []
    for argument in arguments:
        if argument.startswith("-"):
            continue
        try:
            found += parser.parse_overrides([argument])
        except OverrideParseException:
            continue
    return found


def swept_keys(arguments: Sequence[str]) -> list[str]:
    """The fields and groups that take several values, in the order given; none where the command is no sweep."""
    if not is_multirun(arguments):
        return []
    return [o.key_or_group for o in parse_overrides(arguments) if o.is_sweep_override()]
