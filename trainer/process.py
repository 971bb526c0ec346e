"""Processes that die with their starter, and start sooner. Standard library only; used before torch is imported."""

import ctypes
import gc
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["PARENT_VARIABLE", "Interrupted", "die_with_parent", "importing", "interrupted_by"]

# The starter's pid: if it died before the request below took effect, nobody would send the signal.
PARENT_VARIABLE = "REGROW_PARENT_PID"
_PR_SET_PDEATHSIG = 1


class Interrupted(BaseException):
    """A signal came while there was nothing to save."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


def interrupted_by(error: BaseException) -> Interrupted | None:
    """The signal behind an error, None where there was none.

    `Interrupted` comes between any two instructions, also in the middle of somebody's bookkeeping, whose clean-up may
    then fail with an error of its own.
    """
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, Interrupted):
        seen = seen.__context__
    return seen


def die_with_parent(parent_pid: int) -> None:
    """Has the kernel kill this process when its parent dies, however that happens (Linux).

    Args:
        parent_pid: who should be the parent; if it is gone already, the process ends here.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


@contextmanager
def importing() -> Iterator[None]:
    """For imports of much: no garbage is looked for meanwhile, which takes a fifth of their time, nor later among
    what they have made, which stays.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
