"""What all loggers share: rows go from `metrics.jsonl` to a library's store, in a thread of their own.

A logger reads the file that the run writes anyway, and asks its store which step it has last. So no queue can be full
and nothing is dropped: rows wait in the file for as long as a library is slow or away, and each step arrives once and
in order, however often the run was killed. Whatever happens in the thread neither stops nor slows training.
"""

import importlib.util
import logging
import queue
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from regrow.checkpoint.format.step_name import step_folder_name
from regrow.errors import ConfigError
from regrow.trainer.hook import Hook
from regrow.trainer.hooks.logger_line import LoggerLine, begin_line, needs_child, read_line, write_line
from regrow.trainer.jsonlines import RowTail
from regrow.trainer.loop import Trainer
from regrow.trainer.process import Interrupted
from regrow.trainer.resources import Resources
from regrow.trainer.run_files import METRICS
from regrow.trainer.run_record import RunRecord

__all__ = ["LoggedRun", "LoggerHook", "RunEnd", "Store", "measured"]

log = logging.getLogger(__name__)

# Between two looks at the file: rows are then written several at once, and other threads are left alone.
_PAUSE_S = 0.5
# A store that fails is opened again, after so long at first and at most.
_FIRST_RETRY_S, _LAST_RETRY_S = 2.0, 60.0
# Failures in a row before it is worth a warning.
_TRIES = 3
# For all loggers of a run together.
_FINISH_TIMEOUT_S = 60.0
# Importing is all Python's, which training needs too: one library at a time, but none waits for another's server.
_opening = threading.Lock()
_OPENING_S = 20.0


@dataclass(frozen=True, kw_only=True, slots=True)
class RunEnd:
    """How a start ended.

    Attributes:
        kind: `finished`, `terminated`, `preempted` or `failed`.
        step: the last one done.
        error: the failure's message.
    """

    kind: str
    step: int
    error: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggedRun:
    """What a store is told of the run.

    Attributes:
        run_dir: the run's directory.
        run_name: `run.name`.
        run_id: of the run's record.
        sweep: the sweep's name, if any.
        config: the whole config as plain values.
        line: which of the run's lines of steps it is.
    """

    run_dir: Path
    run_name: str
    run_id: str
    sweep: str | None
    config: dict[str, Any]
    line: LoggerLine

    @property
    def name(self) -> str:
        """For people: the run's name, with the lineage's behind it in a child run."""
        return f"{self.run_name}-{self.line.branch}" if self.line.branch else self.run_name

    @property
    def key(self) -> str:
        """Unique, and the same at every start."""
        return f"{self.run_id}-{self.line.branch}" if self.line.branch else self.run_id


class Store(ABC):
    """One run in a library's store. Made and used in the logger's thread alone; after an error it is made anew."""

    @abstractmethod
    def last_step(self) -> int:
        """The last step that the store itself has; 0 for none."""

    @abstractmethod
    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Takes rows in ascending order, each whole or not at all; they are in the store when this returns."""

    def note_commit(self, step: int, place: str) -> None:  # noqa: B027
        """A checkpoint of `step` has become durable in `place`, a path or a URL. Does nothing by default."""

    @abstractmethod
    def close(self, end: RunEnd | None) -> None:
        """Gives back what it holds.

        Args:
            end: how the run ended; None where the store is only opened again.
        """


def measured(row: Mapping[str, Any]) -> dict[str, float]:
    """What a row has to tell of its step: the numbers, without the step itself."""
    return {name: value for name, value in row.items() if name != "step" and isinstance(value, int | float)}


class LoggerHook(Hook):
    """Sends each step's row on to a store, on rank 0; a subclass per library, see `docs/add-a-logger.md`.

    Raises:
        ConfigError: a package is not installed.
    """

    # The choice of the group `logger`, which is the extra's name too; the library's name in messages; its packages.
    NAME: ClassVar[str]
    TITLE: ClassVar[str]
    PACKAGES: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        for package in self.PACKAGES:
            if importlib.util.find_spec(package) is None:
                raise ConfigError(
                    f"logger={self.NAME} must find the package {package}, but it is not installed; use "
                    f"pip install 'regrow[{self.NAME}]', or choose another logger"
                )
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()
        self._ending = threading.Event()
        self._end: RunEnd | None = None
        self._deadline = 0.0
        self._commits: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        self._failures = 0

    @abstractmethod
    def open_store(self, run: LoggedRun) -> Store:
        """Opens the run in the store, making it where it is not there; called in the logger's thread.

        The library is imported here, and not at the top of its module: that takes seconds, and whatever fails in it
        fails in this thread.
        """

    def before_fit(self, trainer: Trainer) -> None:
        """Starts the thread, once the run's record is written and its metrics are cut back."""
        if not trainer.context.is_main:
            return
        record = RunRecord.load(trainer.resources.run_dir)
        assert record is not None, "the launcher writes run.json before any rank starts"
        given = (trainer, record, trainer.state.step)
        self._thread = threading.Thread(target=self._work, args=given, name=self.NAME, daemon=True)
        self._thread.start()

    def after_metrics(self, trainer: Trainer, row: Mapping[str, Any]) -> None:
        """The row is in the file by now; the thread reads it there."""
        self._wake.set()

    def after_commit(self, trainer: Trainer, step: int) -> None:
        """Tells the store."""
        plan = trainer.resources.checkpoint
        if self._thread is not None and plan is not None:
            self._commits.put((step, plan.folder.child(step_folder_name(step)).url))
            self._wake.set()

    def after_fit(self, trainer: Trainer) -> None:
        """All loggers begin to finish here, so that they do so side by side."""
        step = trainer.state.step
        done = step >= trainer.options.steps or trainer.stop is None
        self._finish(RunEnd(kind="finished" if done or trainer.stop is None else trainer.stop.value, step=step))

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """Tells the store why, and does not wait."""
        step = trainer.state.step
        if isinstance(error, Interrupted):
            preempted = error.signal_number == signal.SIGUSR2
            self._finish(RunEnd(kind="preempted" if preempted else "terminated", step=step))
        else:
            self._finish(RunEnd(kind="failed", step=step, error=f"{type(error).__name__}: {error}"))

    def close(self, trainer: Trainer) -> None:
        """Waits until the store has everything, for a minute at most."""
        if self._thread is None:
            return
        self._finish(RunEnd(kind="failed", step=trainer.state.step))
        self._thread.join(max(0.0, self._deadline - time.monotonic()))
        if self._thread.is_alive():
            log.warning("%s did not finish within %.0f s; going on without it", self.TITLE, _FINISH_TIMEOUT_S)

    def _finish(self, end: RunEnd) -> None:
        if self._end is None:
            self._end, self._deadline = end, time.monotonic() + _FINISH_TIMEOUT_S
        self._ending.set()
        self._wake.set()

    def _work(self, trainer: Trainer, record: RunRecord, resumed_from: int) -> None:
        """The thread: tries until it has handed over everything."""
        # Slurm signals every process of a step. What a library starts from here inherits what this thread blocks, and
        # lives until the run is saved.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR2, signal.SIGTERM))
        pause_s = _FIRST_RETRY_S
        while True:
            last_try = self._ending.is_set()
            try:
                self._hand_over(trainer, record, resumed_from)
                return
            except Exception as error:
                self._failures += 1
                log.debug("%s failed", self.TITLE, exc_info=True)
                if self._failures == _TRIES or (last_try and self._failures < _TRIES):
                    what = f"{type(error).__name__}: {error}"
                    log.warning("%s failed (%s); training goes on without it", self.TITLE, what)
            if last_try:
                return
            self._ending.wait(pause_s)
            pause_s = min(2 * pause_s, _LAST_RETRY_S)

    def _hand_over(self, trainer: Trainer, record: RunRecord, resumed_from: int) -> None:
        """Opens the store and feeds it until the run ends."""
        resources = trainer.resources
        note = resources.run_dir / "loggers" / f"{self.NAME}.json"

        known = read_line(note)
        line = begin_line(record, known)
        store = self._opened(resources, record, line)
        try:
            child = needs_child(line, known, held=store.last_step(), resumed_from=resumed_from)
            if child is not None:
                store.close(None)
                line, store = child, self._opened(resources, record, child)
            write_line(note, line)
            step = self._feed(store, max(store.last_step(), line.from_step), resources.run_dir / METRICS)
        except BaseException:
            with suppress(Exception):
                store.close(None)
            raise
        store.close(self._end)
        write_line(note, replace(line, step=step))

    def _opened(self, resources: Resources, record: RunRecord, line: LoggerLine) -> Store:
        run = LoggedRun(
            run_dir=resources.run_dir,
            run_name=resources.run_name,
            run_id=record.run_id,
            sweep=resources.sweep,
            config=resources.config,
            line=line,
        )
        alone = _opening.acquire(timeout=_OPENING_S)
        try:
            return self.open_store(run)
        finally:
            if alone:
                _opening.release()

    def _feed(self, store: Store, step: int, path: Path) -> int:
        """Hands over what comes after `step` until the run ends; returns the last step."""
        tail = RowTail(path)
        while True:
            # Looked at first: what was handed on before the end is then read below.
            ending = self._ending.is_set()
            self._wake.clear()
            while rows := tail.read():
                new = [row for row in rows if row["step"] > step]
                if new:
                    store.write(new)
                    step = new[-1]["step"]
                    self._failures = 0
            while not self._commits.empty():
                store.note_commit(*self._commits.get())
            if ending:
                return step
            self._wake.wait()
            self._ending.wait(_PAUSE_S)
