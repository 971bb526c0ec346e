"""How long a start took, from the process' beginning to the end of its first step, split into its parts.

`mark` is called where a part ends; the hook logs the line. Times are of rank 0; ranks that a launcher starts on this
machine count from the launcher's beginning.
"""

import logging
import os
import time
from collections.abc import Mapping
from typing import Any, final

import psutil

from regrow.trainer.hook import Hook
from regrow.trainer.hooks.config import StartupConfig
from regrow.trainer.loop import Trainer

__all__ = ["STARTED_VARIABLE", "StartupHook", "begin", "mark"]

log = logging.getLogger(__name__)

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


def parts(marks: list[tuple[str, float]], began: float) -> dict[str, float]:
    """Seconds of each part, in order; parts of one name add up."""
    found: dict[str, float] = {}
    for name, at in marks:
        found[name] = found.get(name, 0.0) + at - began
        began = at
    return found


@final
class StartupHook(Hook):
    """See `StartupConfig`. Last, so that its marks come after the others' work."""

    def __init__(self, config: StartupConfig) -> None:
        self._config = config
        self._done = False

    def before_fit(self, trainer: Trainer) -> None:
        mark("state")

    def after_metrics(self, trainer: Trainer, row: Mapping[str, Any]) -> None:
        if self._done or not trainer.context.is_main:
            return
        self._done = True
        mark("first step")
        process = float(os.environ.get(STARTED_VARIABLE, psutil.Process().create_time()))
        began = _began[-1] if len(_began) > 1 else process
        found = parts(_marks, began)
        _marks.clear()
        split = ", ".join(f"{name} {seconds:.2f}" for name, seconds in found.items())
        log.info("first step %.2f s after the start: %s", sum(found.values()), split)
