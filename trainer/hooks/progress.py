"""Progress for people: a display on a terminal, lines elsewhere, and a line of every step in the log's file."""

import logging
from collections.abc import Mapping
from typing import Any, final

from regrow.errors import ConfigError
from regrow.trainer.bars import is_live, terminal
from regrow.trainer.hook import Hook
from regrow.trainer.hooks.config import ProgressConfig
from regrow.trainer.hooks.display import Display
from regrow.trainer.loop import Trainer
from regrow.trainer.wording import FILE_ONLY

__all__ = ["ProgressHook", "format_row"]

log = logging.getLogger(__name__)


def format_row(row: Mapping[str, Any]) -> str:
    """A row in words."""
    norm = "not finite" if row["grad_norm"] is None else f"{row['grad_norm']:.3f}"
    text = f"loss {row['loss']:.4f}  grad_norm {norm}  lr {row['lr']:.2e}  {row['tokens_per_s']:,.0f} tokens/s"
    if row.get("mfu") is not None:
        text += f"  mfu {row['mfu']:.1%}"
    if "data_wait_s" in row:
        text += f"  data_wait {row['data_wait_s'] / max(row['step_time_s'], 1e-9):.0%}"
    if "memory_gib" in row:
        text += f"  memory {row['memory_gib']:.1f} GiB"
    return text + "".join(f"  {name} {value:.4f}" for name, value in row.items() if _is_result(name))


def _is_result(name: str) -> bool:
    """Whether it was measured between steps: losses of validation, and tasks."""
    return name.startswith(("val_loss", "eval/"))


@final
class ProgressHook(Hook):
    """See `ProgressConfig`. On rank 0."""

    def __init__(self, config: ProgressConfig) -> None:
        if config.every < 1:
            raise ConfigError(f"hooks.progress.every must be at least 1, but is {config.every}; use 10")
        self._every = config.every
        self._display: Display | None = None

    def before_fit(self, trainer: Trainer) -> None:
        if not (trainer.context.is_main and is_live()):
            return
        plan = trainer.resources.checkpoint
        self._display = Display(
            terminal(),
            name=trainer.resources.run_name,
            steps=trainer.options.steps,
            step=trainer.state.step,
            save=plan.progress if plan is not None and plan.policies else None,
        )
        self._display.start()

    def after_metrics(self, trainer: Trainer, row: Mapping[str, Any]) -> None:
        if not trainer.context.is_main:
            return
        told = any(map(_is_result, row))
        if self._display is not None:
            self._display.note_row(row)
        else:
            told = told or row["step"] % self._every == 0 or row["step"] in (1, trainer.options.steps)
        where = {} if told else {FILE_ONLY: True}
        log.info("step %d/%d  %s", row["step"], trainer.options.steps, format_row(row), extra=where)

    def after_commit(self, trainer: Trainer, step: int) -> None:
        if self._display is not None:
            self._display.note_commit(step)

    def close(self, trainer: Trainer) -> None:
        if self._display is not None:
            self._display.stop()
