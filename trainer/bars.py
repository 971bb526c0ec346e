"""How far something is that takes a while: a bar on a terminal, elsewhere a line in the log every ten seconds.

What is done within half a second shows nothing.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self, final

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from regrow.trainer.wording import duration

__all__ = ["Bar", "figures", "is_live", "showing", "terminal"]

log = logging.getLogger(__name__)

_MEGABYTE = 10**6
_LINE_EVERY_S = 10.0
_WAITS_S = 0.5


def is_live() -> bool:
    """Whether standard error is a terminal that can be drawn on; a pipe, a file and a Slurm log are none, whatever
    FORCE_COLOR says.
    """
    return sys.stderr.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")


def terminal() -> Console:
    """Standard error as a terminal to draw on; NO_COLOR leaves the colours out."""
    return Console(stderr=True, force_terminal=True, highlight=False)


def figures(done_bytes: int, total_bytes: int, elapsed_s: float) -> str:
    """How much is done, how fast, and how long the rest will take; in MB of 10⁶ bytes."""
    amount = f"{done_bytes / _MEGABYTE:,.0f} of {total_bytes / _MEGABYTE:,.0f} MB"
    if done_bytes <= 0 or elapsed_s <= 0:
        return amount
    speed = done_bytes / elapsed_s
    return f"{amount}, {speed / _MEGABYTE:.1f} MB/s, {duration((total_bytes - done_bytes) / speed)} left"


@final
class Bar:
    """A context in which progress is shown, by any thread.

    Args:
        what: is being done, like `verifying`.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._lock = threading.Lock()
        self._started = self._said = time.monotonic()
        self._live = is_live()
        self._drawn: Progress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._live = False
            if self._drawn is not None:
                with suppress(OSError):  # the terminal is gone
                    self._drawn.stop()
                self._drawn = None

    def update(self, done: int, total: int, words: str | None = None) -> None:
        """Shows it now, or in a while.

        Args:
            done: so far.
            total: of it, in the same unit.
            words: beside the bar; by default `figures` of bytes.
        """
        now = time.monotonic()
        with self._lock:
            if words is None:
                words = figures(done, total, now - self._started)
            if self._live and now - self._started >= _WAITS_S:
                with suppress(OSError):
                    self._draw(done, total, words)
            elif not self._live and now - self._said >= _LINE_EVERY_S:
                self._said = now
                log.info("%s: %s", self._what, words)

    def _draw(self, done: int, total: int, words: str) -> None:
        """The bar, which begins when there is something to wait for, and leaves nothing behind."""
        if self._drawn is None:
            columns = (TextColumn("{task.description}"), BarColumn(32), TextColumn("{task.fields[words]}"))
            self._drawn = Progress(*columns, console=terminal(), transient=True)
            self._drawn.add_task(self._what, total=total, words="")
            self._drawn.start()
        self._drawn.update(self._drawn.task_ids[0], completed=done, total=total, words=words)


@contextmanager
def showing(what: str, *, quiet: bool = False) -> Iterator[Bar | None]:
    """A bar within; None where nothing is to be shown.

    Args:
        what: is being done.
        quiet: show nothing.
    """
    if quiet:
        yield None
        return
    with Bar(what) as bar:
        yield bar
