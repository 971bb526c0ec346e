"""How far tokenising is; see `regrow.trainer.bars` for how that is shown."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

from regrow.trainer.bars import Bar, figures

__all__ = ["Amount", "TokenizingProgress", "showing_progress"]

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


@final
class TokenizingProgress:
    """Shows how far tokenising is; see `showing_progress`."""

    def __init__(self, bar: Bar, total_bytes: int, parts: int) -> None:
        self._bar = bar
        self._amount = Amount(total_bytes)
        self._parts = parts
        self._finished = 0
        self._started = time.monotonic()

    def finish(self, size_bytes: int, tokens: int) -> None:
        """Counts a part that is done."""
        self._finished += 1
        self._amount.finish(size_bytes, tokens)

    def show(self, tokens: int) -> None:
        """Shows it now, or in a while.

        Args:
            tokens: written so far, those of parts that are not done included.
        """
        total = self._amount.total_bytes
        if not total:
            # What the size of a corpus is that is not in files, nobody knows before it is read.
            self._bar.update(self._finished, self._parts, f"{self._finished} of {self._parts} parts")
            return
        done = self._amount.done_bytes(tokens)
        self._bar.update(done, total, figures(done, total, time.monotonic() - self._started))


@contextmanager
def showing_progress(total_bytes: int, parts: int) -> Iterator[TokenizingProgress]:
    """Shows progress within.

    Args:
        total_bytes: of the files that are tokenised; 0: not known.
        parts: in which they are.
    """
    with Bar("tokenising") as bar:
        yield TokenizingProgress(bar, total_bytes, parts)
