"""A rank's request to stop, from the signals that it receives."""

import signal
from typing import final

from regrow.launch.run.signals import StopFlag
from regrow.trainer.loop import StopReason

__all__ = ["StopRequest"]


@final
class StopRequest:
    """What the loop asks once a step. Before the first step nothing would be lost, so until the loop first asks a
    signal ends the rank at once, and where that step compiles, until it has.

    Args:
        flag: the signal handler.
        compiles: whether the first step may take minutes.
        saves: whether the run saves its state when it is asked to stop.
    """

    def __init__(self, flag: StopFlag, *, compiles: bool, saves: bool) -> None:
        self._flag = flag
        flag.saves = saves
        self._early = 1 if compiles else 0

    def __call__(self) -> StopReason | None:
        if self._early == 0:
            self._flag.train()
        self._early = max(0, self._early - 1)
        return _reason(self._flag.received)


def _reason(received: int | None) -> StopReason | None:
    if received is None:
        return None
    return StopReason.preempted if received == signal.SIGUSR2 else StopReason.terminated
