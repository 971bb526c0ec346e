"""How far tokenising is: a bar on a terminal, elsewhere a line in the log every ten seconds."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

__all__ = ["Amount", "TokenizingProgress", "figures", "showing_progress"]

log = logging.getLogger(__name__)

_MEGABYTE = 10**6
_LINE_EVERY_S = 10.0
# Until a part has shown how much it is; English and code are near it.
_BYTES_PER_TOKEN = 4.0


@final
class Amount:
    """How much of the corpus is done, also of parts that are being tokenised, by the tokens that they have so far.

    Attributes:
        total_bytes: of all parts.

    Args:
        total_bytes: see above.
    """

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self._bytes = 0
        self._tokens = 0

    def finish(self, size_bytes: int, tokens: int) -> None:
        """Counts a part that is done."""
        self._bytes += size_bytes
        self._tokens += tokens

    def done_bytes(self, tokens: int) -> int:
        """How much is done.

        Args:
            tokens: of all parts so far, those that are not done included.
        """
        each = self._bytes / self._tokens if self._tokens else _BYTES_PER_TOKEN
        begun = max(0, tokens - self._tokens) * each
        return min(self._bytes + int(begun), self.total_bytes)


def figures(done_bytes: int, total_bytes: int, elapsed_s: float) -> str:
    """How much is done, how fast, and how long the rest will take; in MB of 10⁶ bytes."""
    amount = f"{done_bytes / _MEGABYTE:,.0f} of {total_bytes / _MEGABYTE:,.0f} MB"
    if done_bytes <= 0 or elapsed_s <= 0:
        return amount
    speed = done_bytes / elapsed_s
    return f"{amount}, {speed / _MEGABYTE:.1f} MB/s, {_duration((total_bytes - done_bytes) / speed)} left"


def _duration(seconds: float) -> str:
    """For instance 2 h 05 min, 3 min 20 s, 7 s."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


@final
class TokenizingProgress:
    """Shows how far tokenising is; see `showing_progress`."""

    def __init__(self, bar: Progress, total_bytes: int, parts: int) -> None:
        self._bar = bar
        self._task = bar.add_task("tokenising", total=total_bytes or parts, figures="")
        self._amount = Amount(total_bytes)
        self._parts = parts
        self._finished = 0
        self._started = self._said = time.monotonic()

    def finish(self, size_bytes: int, tokens: int) -> None:
        """Counts a part that is done."""
        self._finished += 1
        self._amount.finish(size_bytes, tokens)

    def show(self, tokens: int) -> None:
        """Shows it now, or in a while.

        Args:
            tokens: written so far, those of parts that are not done included.
        """
        now, total = time.monotonic(), self._amount.total_bytes
        done = self._amount.done_bytes(tokens)
        # What the size of a corpus is that is not in files, nobody knows before it is read.
        words = figures(done, total, now - self._started) if total else f"{self._finished} of {self._parts} parts"
        self._bar.update(self._task, completed=done if total else self._finished, figures=words)
        if self._bar.disable and now - self._said >= _LINE_EVERY_S:
            self._said = now
            log.info("tokenising: %s", words)


@contextmanager
def showing_progress(total_bytes: int, parts: int) -> Iterator[TokenizingProgress]:
    """Shows progress within.

    Args:
        total_bytes: of the files that are tokenised; 0: not known.
        parts: in which they are.
    """
    console = Console(stderr=True)
    columns = (TextColumn("tokenising"), BarColumn(), TextColumn("{task.fields[figures]}"))
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        yield TokenizingProgress(bar, total_bytes, parts)
