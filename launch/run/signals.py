"""Requests to stop. Standard library only: the handlers stand before torch is imported.

Before the first step there is nothing to save, so a signal ends the program at once, whatever it is loading or
compiling; from then on it sets a flag that the loop looks at once a step.
"""

import contextlib
import os
import signal
from types import FrameType
from typing import final

from regrow.trainer.process import Interrupted

__all__ = ["SIGNALS", "STOP_NOTE", "STOP_NOTE_VARIABLE", "Interrupted", "StopFlag", "write_note"]

# USR2 is a preemption or a time limit, announced by the scheduler; TERM and INT are a user's request.
SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
# Beside a rank's spec: the signal that the launcher was stopped by.
STOP_NOTE = "stop"
# Names a file in which the batch script reads what its ranks were stopped by.
STOP_NOTE_VARIABLE = "REGROW_STOP_NOTE"


@final
class StopFlag:
    """The process' one signal handler.

    Args:
        exits: whether a second Ctrl-C ends the process at once; else it raises KeyboardInterrupt, as a caller's
            notebook expects.

    Attributes:
        received: the first signal since training began, None when there was none.
    """

    def __init__(self, *, exits: bool = True) -> None:
        self.received: int | None = None
        self._exits = exits
        self._deferring = False

    def install(self) -> None:
        """Takes the signals over."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def defer(self, *, deferring: bool) -> None:
        """Whether a signal sets the flag (steps are done) or raises `Interrupted` (before and after)."""
        self._deferring = deferring

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received is None:
            write_note(signal.Signals(number).name.removeprefix("SIG"))
        if not self._deferring:
            raise Interrupted(number)
        if self.received is not None and number == signal.SIGINT:
            self.leave()
        self.received = self.received or number

    def leave(self) -> None:
        """What a second Ctrl-C does: it does not wait for a save."""
        if self._exits:
            os._exit(130)
        raise KeyboardInterrupt


def write_note(text: str) -> None:
    """One line for the batch script, if there is one: a signal's name, `FAILED` or `REFUSED`."""
    path = os.environ.get(STOP_NOTE_VARIABLE)
    if path:
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            os.write(descriptor, f"{text}\n".encode())
            os.close(descriptor)
