"""Requests to stop. Standard library only: the handlers stand before torch is imported.

Before the first step there is nothing to save, so a signal ends the program at once, whatever it is loading or
compiling; from then on it sets a flag that the loop looks at once a step.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import final

from regrow.trainer.process import Interrupted

__all__ = ["SIGNALS", "STOP_NOTE", "STOP_NOTE_VARIABLE", "Interrupted", "StopFlag", "show_cursor", "write_note"]

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
        saves: whether the run saves its state when it is asked to stop.
        cause: what somebody else was stopped by who passed it on; a rank's launcher turns Ctrl-C into TERM.
        passes_on: the ranks are other processes, which say themselves what they do.
    """

    def __init__(self, *, exits: bool = True) -> None:
        self.received: int | None = None
        self.saves = True
        self.cause: Callable[[], int | None] = _nobody
        self.passes_on = False
        self._exits = exits
        self._deferring = False
        self._training = False

    def install(self) -> None:
        """Takes the signals over."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def defer(self, *, deferring: bool) -> None:
        """Whether a signal sets the flag (steps are done) or raises `Interrupted` (before and after)."""
        self._deferring = deferring
        self._training = False

    def train(self) -> None:
        """Steps are being done: a signal sets the flag."""
        self._deferring = self._training = True

    @property
    def is_deferring(self) -> bool:
        """See `defer`."""
        return self._deferring

    @property
    def leaves_at_once(self) -> bool:
        """Whether a second Ctrl-C ends this process, whatever it is doing."""
        return self._deferring and self._exits

    def sentence(self, number: int) -> str:
        """What a signal that came just now does, in words; empty where somebody else says it."""
        if self.passes_on:
            return ""
        number = self.cause() or number
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        if not self._training:
            return f"{name}: stopping before the first step, so that nothing is lost"
        ends = "the state is saved, then the run ends" if self.saves else "then the run ends; nothing is saved"
        again = "; Ctrl-C again ends it at once, without saving" if number == signal.SIGINT else ""
        return f"{name}: the step under way is finished, {ends}{again}"

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
            show_cursor()
            os._exit(130)
        raise KeyboardInterrupt


def _nobody() -> int | None:
    """Nothing was passed on. (A flag travels to other processes, and a lambda could not.)"""
    return None


def show_cursor() -> None:
    """A display on the terminal may have hidden it, and who leaves at once does not end that."""
    if sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        with contextlib.suppress(OSError):
            os.write(2, b"\x1b[?25h\n")


def write_note(text: str) -> None:
    """One line for the batch script, if there is one: a signal's name, `FAILED` or `REFUSED`."""
    path = os.environ.get(STOP_NOTE_VARIABLE)
    if path:
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            os.write(descriptor, f"{text}\n".encode())
            os.close(descriptor)
