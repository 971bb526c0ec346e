"""Says at once that a request to stop was heard. Standard library only: it begins before torch is imported.

Python runs a signal's handler between two of its own instructions, so not before an operator returns, which may
take many seconds. The signal's number is written to a pipe at once, though, and a thread that waits there needs no
turn of the main thread's.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

from regrow.launch.run.signals import SIGNALS, StopFlag

__all__ = ["Acknowledger", "acknowledging", "speaks_for_all"]

log = logging.getLogger(__name__)

# Before the first step a handler mostly ends the process sooner than that, with a sentence of its own.
_STARTING_S = 0.2
_CLOSE = b"\0"


def speaks_for_all() -> bool:
    """Whether this process, of all ranks, is the one that says it."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


@final
class Acknowledger:
    """The thread; it says one sentence, and lets a second Ctrl-C act even while the main thread cannot.

    Args:
        flag: knows what a signal does at this moment.
    """

    def __init__(self, flag: StopFlag) -> None:
        self._flag = flag
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._before = -1
        self._interrupts = 0
        self._said = False
        self._thread = threading.Thread(target=self._work, name="signals", daemon=True)

    def start(self) -> None:
        """Begins; in the main thread."""
        self._before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._thread.start()

    def stop(self) -> None:
        """Ends; in the main thread. Whoever was told of signals before is told again."""
        signal.set_wakeup_fd(self._before)
        os.write(self._writer, _CLOSE)
        self._thread.join()
        os.close(self._reader)
        os.close(self._writer)

    def hear(self, number: int) -> None:
        """Has the thread say it of a signal that came before it began."""
        os.write(self._writer, bytes([number]))

    def _work(self) -> None:
        while True:
            for number in os.read(self._reader, 64):
                if number == 0:
                    return
                if number in SIGNALS:
                    self._heard(number)

    def _heard(self, number: int) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1 and self._flag.leaves_at_once:
            self._flag.leave()
        if self._said:
            return
        if not self._flag.is_deferring:
            time.sleep(_STARTING_S)
        sentence = self._flag.sentence(number)
        if sentence:
            self._said = True
            log.warning("%s", sentence)


@contextmanager
def acknowledging(flag: StopFlag) -> Iterator[None]:
    """Acknowledges signals within, where this is the main thread and speaks for all ranks."""
    if threading.current_thread() is not threading.main_thread() or not speaks_for_all():
        yield
        return
    acknowledger = Acknowledger(flag)
    acknowledger.start()
    try:
        yield
    finally:
        acknowledger.stop()
