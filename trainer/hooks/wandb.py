"""Weights & Biases. The only file that imports wandb, and only in a thread of its own: whatever happens there
neither stops nor slows training.
"""

import logging
import queue
import signal
import threading
from collections.abc import Iterator, Mapping
from typing import Any, final

from regrow.trainer.hook import Hook
from regrow.trainer.hooks.config import WandbHookConfig
from regrow.trainer.jsonlines import read_rows
from regrow.trainer.loop import Trainer
from regrow.trainer.resources import Resources
from regrow.trainer.run_files import METRICS
from regrow.trainer.run_record import RunRecord, RunRecordError

__all__ = ["WandbHook"]

log = logging.getLogger(__name__)

_FINISH_TIMEOUT_S = 60.0
_STEP = "train/global_step"


@final
class WandbHook(Hook):
    """See `WandbHookConfig`. One W&B run for the whole life of a run, on rank 0."""

    def __init__(self, config: WandbHookConfig) -> None:
        self._config = config.settings
        self._queue: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._complete = False

    def before_fit(self, trainer: Trainer) -> None:
        if not trainer.context.is_main:
            return
        run_dir = trainer.resources.run_dir
        record = RunRecord.load(run_dir)
        assert record is not None
        # What W&B did not take to the end (a kill, a failure, another logger before) is handed over again.
        for row in read_rows(run_dir / METRICS):
            if row["step"] > record.wandb_step:
                self._queue.put(row)
        given = (trainer.resources, record.run_id)
        self._thread = threading.Thread(target=self._work, args=given, name="wandb", daemon=True)
        self._thread.start()

    def after_metrics(self, trainer: Trainer, row: Mapping[str, Any]) -> None:
        if self._thread is not None:
            self._queue.put(row)

    def close(self, trainer: Trainer) -> None:
        if self._thread is None:
            return
        self._queue.put(None)
        self._thread.join(_FINISH_TIMEOUT_S)
        if self._thread.is_alive():
            log.warning("W&B did not finish within %.0f s; going on without it", _FINISH_TIMEOUT_S)
        elif self._complete:
            self._note_complete(trainer)

    def _note_complete(self, trainer: Trainer) -> None:
        """Writes down what W&B has; without that the next start hands the rows over again."""
        try:
            record = RunRecord.load(trainer.resources.run_dir)
            assert record is not None
            record.wandb_step = trainer.state.step
            record.save(trainer.resources.run_dir)
        except (OSError, RunRecordError) as error:
            log.warning("run.json cannot be written now (%s)", error)

    def _rows(self) -> Iterator[Mapping[str, Any]]:
        while (row := self._queue.get()) is not None:
            yield row

    def _work(self, resources: Resources, run_id: str) -> None:
        # Slurm signals every process of a step. W&B's own, which this thread starts, inherits what it blocks, and
        # lives until the run is saved.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR2, signal.SIGTERM))
        try:
            # Here, and not at the top: importing it takes a second, and whatever fails in it fails in this thread.
            import wandb

            run = wandb.init(
                project=self._config.project,
                entity=self._config.entity,
                group=self._config.group or resources.sweep,
                tags=list(self._config.tags),
                mode=self._config.mode.value,
                id=run_id,
                name=resources.run_name,
                config=resources.config,
                dir=str(resources.run_dir),
                resume="allow",
                settings=wandb.Settings(console="off", silent=True),
            )
            run.define_metric(_STEP)
            run.define_metric("*", step_metric=_STEP)
            for row in self._rows():
                values = {f"train/{k}": v for k, v in row.items() if k != "step" and v is not None}
                run.log({_STEP: row["step"], **values})
            run.finish()
            self._complete = True
        except Exception as error:
            log.warning("W&B failed (%s: %s); training goes on without it", type(error).__name__, error)
