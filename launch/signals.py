"""Requests to stop. Standard library only: the handlers stand before torch is imported.

Before training there is nothing to save, so a signal ends the program at once; during training it sets a flag
that the loop looks at once a step.
"""

import os
import signal
from types import FrameType
from typing import final

__all__ = ["SIGNALS", "Interrupted", "StopFlag"]

# USR2 is a preemption or a time limit, announced by the scheduler; TERM and INT are somebody's wish.
SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):
    """A signal came while there was nothing to save."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


@final
class StopFlag:
    """The process' one signal handler.

    Attributes:
        received: the first signal since training began, None when there was none.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._deferring = False

    def install(self) -> None:
        """Takes the signals over."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def defer(self, *, deferring: bool) -> None:
        """Whether a signal sets the flag (training) or raises `Interrupted` (before and after)."""
        self._deferring = deferring

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if not self._deferring:
            raise Interrupted(number)
        if self.received is not None and number == signal.SIGINT:
            # The second Ctrl-C means it.
            os._exit(130)
        self.received = self.received or number
