"""Names in a checkpoint folder: which are steps, and which are what is left of one."""

import re

__all__ = [
    "ASIDE",
    "METADATA",
    "is_leftover",
    "parse_leftover",
    "parse_set_aside",
    "parse_step_name",
    "step_folder_name",
]

# The file in which DCP describes a checkpoint; its own spelling is private.
METADATA = ".metadata"
# The folder beside the steps for those that are no longer on the run's line.
ASIDE = "set-aside"

# One spelling a number: `step-021`, other scripts' digits and numbers beyond 18 digits are not steps.
_STEP = re.compile(r"step-(0|[1-9][0-9]{0,17})")
# Where the name is taken in `set-aside`, a number follows.
_SET_ASIDE = re.compile(rf"{_STEP.pattern}(\.[0-9]+)?")
_LEFTOVER = re.compile(rf"{_STEP.pattern}\.(partial|removing)-.*", re.DOTALL)


def step_folder_name(step: int) -> str:
    """`step-N`."""
    return f"step-{step}"


def parse_step_name(name: str) -> int | None:
    """The number of a step's name; None for any other name."""
    found = _STEP.fullmatch(name)
    return int(found[1]) if found else None


def parse_leftover(name: str) -> int | None:
    """The number of the step that a folder of a cut save or removal is of; None for any other name."""
    found = _LEFTOVER.fullmatch(name)
    return int(found[1]) if found else None


def parse_set_aside(name: str) -> int | None:
    """The number of a step that was set aside; None for any other name."""
    found = _SET_ASIDE.fullmatch(name)
    return int(found[1]) if found else None


def is_leftover(name: str) -> bool:
    """Whether a name is that of a save or of a removal that was cut short, or is under way."""
    return parse_leftover(name) is not None
