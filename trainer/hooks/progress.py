"""Progress for people: a bar on a terminal, plain lines elsewhere."""

import logging
import sys
from collections.abc import Mapping
from typing import Any, final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from regrow.errors import ConfigError
from regrow.trainer.hook import Hook
from regrow.trainer.hooks.config import ProgressConfig
from regrow.trainer.loop import Trainer

__all__ = ["ProgressHook", "format_row"]

log = logging.getLogger(__name__)


def format_row(row: Mapping[str, Any]) -> str:
    """A row in words."""
    norm = "not finite" if row["grad_norm"] is None else f"{row['grad_norm']:.3f}"
    text = f"loss {row['loss']:.4f}  grad_norm {norm}  lr {row['lr']:.2e}  {row['tokens_per_s']:,.0f} tokens/s"
    if row.get("mfu") is not None:
        text += f"  mfu {row['mfu']:.1%}"
    if "val_loss" in row:
        text += f"  val_loss {row['val_loss']:.4f}"
    return text


@final
class ProgressHook(Hook):
    """See `ProgressConfig`. On rank 0."""

    def __init__(self, config: ProgressConfig) -> None:
        if config.every < 1:
            raise ConfigError(f"hooks.progress.every must be at least 1, but is {config.every}; use 10")
        self._every = config.every
        self._progress: Progress | None = None

    def before_fit(self, trainer: Trainer) -> None:
        if not (trainer.context.is_main and sys.stderr.isatty()):
            return
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._progress.add_task("", total=trainer.options.steps, completed=trainer.state.step)
        self._progress.start()

    def after_metrics(self, trainer: Trainer, row: Mapping[str, Any]) -> None:
        if not trainer.context.is_main:
            return
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=row["step"], description=format_row(row))
        elif row["step"] % self._every == 0 or row["step"] in (1, trainer.options.steps) or "val_loss" in row:
            log.info("step %d/%d  %s", row["step"], trainer.options.steps, format_row(row))

    def close(self, trainer: Trainer) -> None:
        if self._progress is not None:
            self._progress.stop()
