"""Where the parts of a start end; `regrow.trainer.hooks.startup` tells of them.

Times are of rank 0; ranks that a launcher starts on this machine count from the launcher's beginning.
"""

import os
import time

import psutil

__all__ = ["STARTED_VARIABLE", "begin", "mark", "take_parts"]

# When the launcher's process began, in seconds since 1970.
STARTED_VARIABLE = "REGROW_STARTED_AT"
_marks: list[tuple[str, float]] = []
# Of the second and later runs of this process; the first begins with the process.
_began: list[float] = []


def begin() -> None:
    """A run begins here."""
    _began.append(time.time())
    _marks.clear()


def mark(part: str) -> None:
    """A part of the start ends here."""
    _marks.append((part, time.time()))


def take_parts() -> dict[str, float]:
    """Seconds of each part of this run's start, in order; they are told once."""
    process = float(os.environ.get(STARTED_VARIABLE, psutil.Process().create_time()))
    found = parts(_marks, _began[-1] if len(_began) > 1 else process)
    _marks.clear()
    return found


def parts(marks: list[tuple[str, float]], began: float) -> dict[str, float]:
    """Seconds of each part, in order; parts of one name add up."""
    found: dict[str, float] = {}
    for name, at in marks:
        found[name] = found.get(name, 0.0) + at - began
        began = at
    return found
