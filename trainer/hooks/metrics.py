"""`metrics.jsonl` and `samples.jsonl`."""

from collections.abc import Mapping
from typing import Any, final

import numpy as np
import torch.distributed as dist

from regrow.trainer.hook import Hook
from regrow.trainer.hooks.config import MetricsConfig, SamplesConfig
from regrow.trainer.jsonlines import StepLog
from regrow.trainer.loop import Trainer
from regrow.trainer.run_files import METRICS, SAMPLES

__all__ = ["MetricsHook", "SamplesHook"]


@final
class MetricsHook(Hook):
    """See `MetricsConfig`. Writes each step's row once, however often the run is restarted; rank 0 alone."""

    def __init__(self, config: MetricsConfig) -> None:
        self._config = config
        self._log: StepLog | None = None

    def before_fit(self, trainer: Trainer) -> None:
        if trainer.context.is_main:
            self._log = StepLog(trainer.resources.run_dir / METRICS, trainer.state.step)

    def after_metrics(self, trainer: Trainer, row: Mapping[str, Any]) -> None:
        if self._log is not None:
            self._log.append(row)

    def before_commit(self, trainer: Trainer, step: int) -> None:
        if self._log is not None:
            self._log.make_durable()

    def after_fit(self, trainer: Trainer) -> None:
        if self._log is not None:
            self._log.make_durable()

    def close(self, trainer: Trainer) -> None:
        if self._log is not None:
            self._log.close()


@final
class SamplesHook(Hook):
    """See `SamplesConfig`. The windows are those that the ranks really read."""

    def __init__(self, config: SamplesConfig) -> None:
        self._config = config
        self._log: StepLog | None = None

    def before_fit(self, trainer: Trainer) -> None:
        if trainer.context.is_main:
            self._log = StepLog(trainer.resources.run_dir / SAMPLES, trainer.state.step)

    def after_step(self, trainer: Trainer) -> None:
        assert trainer.batch is not None
        context = trainer.context
        parts: list[Any] | None = [None] * context.world_size if context.is_main else None
        # Ranks that share their data with others report it once.
        own = trainer.batch.ids if context.reads_first else trainer.batch.ids[:0]
        dist.gather_object((own.windows, own.sources), parts, group=context.cpu_group, group_dst=0)
        if self._log is not None and parts is not None:
            windows, sources = (np.concatenate(columns).tolist() for columns in zip(*parts, strict=True))
            names = trainer.options.sources
            more = {"sources": [names[s] for s in sources]} if len(names) > 1 else {}
            self._log.append({"step": trainer.state.step, "ids": windows, **more})

    def before_commit(self, trainer: Trainer, step: int) -> None:
        if self._log is not None:
            self._log.make_durable()

    def close(self, trainer: Trainer) -> None:
        if self._log is not None:
            self._log.close()
