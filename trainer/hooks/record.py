"""Keeps the run's own history in `run.json`, one attempt per start of the ranks."""

import logging
import signal
from collections.abc import Mapping
from typing import Any, final

from regrow.checkpoint.run.lease import LeaseLostError
from regrow.trainer.hook import Hook
from regrow.trainer.hooks.config import RecordConfig
from regrow.trainer.loop import Trainer
from regrow.trainer.process import Interrupted
from regrow.trainer.run_record import Attempt, RunRecord, RunRecordError

__all__ = ["RecordHook"]

log = logging.getLogger(__name__)


@final
class RecordHook(Hook):
    """See `RecordConfig`. Adds this attempt when training starts and its end when it ends; rank 0 alone."""

    def __init__(self, config: RecordConfig) -> None:
        self._config = config
        self._attempt = Attempt()
        self._index: int | None = None

    def _load(self, trainer: Trainer) -> RunRecord:
        record = RunRecord.load(trainer.resources.run_dir)
        assert record is not None, "the launcher writes run.json before any rank starts"
        return record

    def before_fit(self, trainer: Trainer) -> None:
        if not trainer.context.is_main:
            return
        record, self._attempt = self._load(trainer), trainer.resources.attempt
        self._attempt.lineage = record.lineages[-1].id
        self._attempt.from_step = self._attempt.to_step = trainer.state.step
        self._index = len(record.attempts)
        record.attempts.append(self._attempt)
        record.save(trainer.resources.run_dir)

    def after_metrics(self, trainer: Trainer, row: Mapping[str, Any]) -> None:
        self._attempt.to_step = int(row["step"])

    def after_commit(self, trainer: Trainer, step: int) -> None:
        if trainer.context.is_main:
            self._attempt.saved_step = step
            self._write(trainer)

    def after_fit(self, trainer: Trainer) -> None:
        if trainer.context.is_main:
            done = trainer.state.step >= trainer.options.steps
            self._attempt.end = "finished" if done or trainer.stop is None else trainer.stop.value
            self._write(trainer)

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        # A run that another writer has taken over is not this one's to describe.
        if trainer.context.is_main and not isinstance(error, LeaseLostError):
            self._attempt.end, self._attempt.error = "failed", f"{type(error).__name__}: {error}"
            if isinstance(error, Interrupted):
                preempted = error.signal_number == signal.SIGUSR2
                self._attempt.end, self._attempt.error = "preempted" if preempted else "terminated", None
            self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        if self._index is None:
            return  # it ended before it began
        try:
            record = self._load(trainer)
            record.attempts[self._index] = self._attempt
            record.save(trainer.resources.run_dir)
        except OSError as error:
            log.warning("run.json cannot be written now (%s); it is written again later", error.strerror or error)
        except RunRecordError as error:
            log.warning("%s; it is written again later", error)
