"""How far a save is, for whoever shows it. Noting it costs an assignment for each window of 8 MiB."""

from collections.abc import Iterator
from enum import Enum
from typing import final

__all__ = ["SaveProgress", "SaveStage"]


class SaveStage(Enum):
    """What is being done of a save on this rank.

    `staging` copies the state, `writing` sends it to the storage, `committing` waits for the other ranks and makes
    the step valid. `saved` and `failed` are how the last one ended; `none`: there was none.
    """

    none = "none"
    staging = "staging"
    writing = "writing"
    committing = "committing"
    saved = "saved"
    failed = "failed"


@final
class SaveProgress:
    """Of this rank's last save; the threads that save write it, and any thread may read it.

    Attributes:
        stage: what is being done.
        step: of which step.
        total_bytes: that this rank writes.
    """

    def __init__(self) -> None:
        self.stage = SaveStage.none
        self.step = 0
        self.total_bytes = 0
        # One for each file, since files are written at once and a sum is not one operation.
        self._written: dict[int, int] = {}

    def begin(self, step: int, total_bytes: int) -> None:
        """A save begins: the state is copied."""
        self.step, self.total_bytes, self._written = step, total_bytes, {}
        self.stage = SaveStage.staging

    def counting(self, file: int, windows: Iterator[memoryview]) -> Iterator[memoryview]:
        """A file's windows as they are, each counted when the next one is asked for."""
        self.stage = SaveStage.writing
        written = 0
        for window in windows:
            yield window
            written += len(window)
            self._written[file] = written

    def commit(self) -> None:
        """This rank has written its part."""
        self.stage = SaveStage.committing

    def end(self, *, saved: bool) -> None:
        """The step is valid, or the save has failed."""
        self.stage = SaveStage.saved if saved else SaveStage.failed

    @property
    def written_bytes(self) -> int:
        """How much of it the storage has taken."""
        return sum(self._written.copy().values())
