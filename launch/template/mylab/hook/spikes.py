"""Where the loss jumps."""

from collections import deque
from collections.abc import Mapping
from typing import Any, final

from regrow.launch.template.mylab.hook.config import SpikesConfig
from regrow.trainer.hook import Hook
from regrow.trainer.jsonlines import StepLog, read_rows
from regrow.trainer.loop import Trainer
from regrow.trainer.run_files import METRICS

__all__ = ["SPIKES", "SpikesHook"]

SPIKES = "spikes.jsonl"


@final
class SpikesHook(Hook):
    """See `SpikesConfig`. A run that was killed writes the rows of one that was not: what it knew is read again."""

    def __init__(self, config: SpikesConfig) -> None:
        if config.window < 1:
            raise ValueError(f"hooks.spikes.window must be at least 1, but is {config.window}; use 20")
        if config.factor <= 0:
            raise ValueError(f"hooks.spikes.factor must be above 0, but is {config.factor}; use 1.2")
        self._factor = config.factor
        self._recent: deque[float] = deque(maxlen=config.window)
        self._log: StepLog | None = None

    def before_fit(self, trainer: Trainer) -> None:
        if not trainer.context.is_main:
            return
        run_dir, step = trainer.resources.run_dir, trainer.state.step
        self._recent.extend(row["loss"] for row in read_rows(run_dir / METRICS) if row["step"] <= step)
        # Rows beyond the step that the run resumes from are dropped, so that each step is written once.
        self._log = StepLog(run_dir / SPIKES, step)

    def after_metrics(self, trainer: Trainer, row: Mapping[str, Any]) -> None:
        if self._log is None:
            return
        mean = sum(self._recent) / max(1, len(self._recent))
        if len(self._recent) == self._recent.maxlen and row["loss"] > self._factor * mean:
            self._log.append({"step": row["step"], "loss": row["loss"], "mean": mean})
        self._recent.append(row["loss"])

    def before_commit(self, trainer: Trainer, step: int) -> None:
        # A step never becomes valid before what belongs to it is on the disk.
        if self._log is not None:
            self._log.make_durable()

    def after_fit(self, trainer: Trainer) -> None:
        if self._log is not None:
            self._log.make_durable()

    def close(self, trainer: Trainer) -> None:
        if self._log is not None:
            self._log.close()
