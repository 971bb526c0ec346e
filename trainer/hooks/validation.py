"""Loss on the validation split, the same under every layout."""

import logging
from typing import final

import torch
import torch.distributed as dist

from regrow.errors import ConfigError
from regrow.trainer.data.loader import step_batch
from regrow.trainer.data.samples import Samples
from regrow.trainer.hook import Hook
from regrow.trainer.hooks.config import ValidationConfig
from regrow.trainer.jsonlines import read_rows, rewrite_rows
from regrow.trainer.loop import Trainer
from regrow.trainer.run_files import METRICS

__all__ = ["ValidationHook"]

log = logging.getLogger(__name__)


@final
class ValidationHook(Hook):
    """See `ValidationConfig`. Its result is the row's `val_loss`, in nats a token."""

    def __init__(self, config: ValidationConfig) -> None:
        if config.every < 1:
            raise ConfigError(f"hooks.validation.every must be at least 1, but is {config.every}; use 100")
        if config.max_batches < 0:
            raise ConfigError(
                f"hooks.validation.max_batches must be at least 0, but is {config.max_batches}; use 0 for all"
            )
        self._config = config

    def before_fit(self, trainer: Trainer) -> None:
        if not trainer.resources.validation and trainer.context.is_main:
            log.warning("no document falls into the validation split: no val_loss; raise data.validation_fraction")

        if self._due(trainer) and trainer.stop is None:
            self._catch_up(trainer)

    def _due(self, trainer: Trainer) -> bool:
        step = trainer.state.step
        chosen = step % self._config.every == 0 or step in (1, trainer.options.steps)
        return bool(trainer.resources.validation) and step > 0 and chosen

    def after_optimizer_step(self, trainer: Trainer) -> None:
        if self._due(trainer):
            with trainer.evaluating():
                loss = self._measure(trainer, trainer.resources.validation)
            if loss is not None:
                trainer.add_metrics(val_loss=loss)

    def _catch_up(self, trainer: Trainer) -> None:
        """Measures the resumed step where a stop came before its validation had ended, and mends its row."""
        path, step, context = trainer.resources.run_dir / METRICS, trainer.state.step, trainer.context
        rows = [r for r in read_rows(path) if r["step"] <= step] if context.is_main else []
        wanted = [bool(rows) and rows[-1]["step"] == step and "val_loss" not in rows[-1]]
        dist.broadcast_object_list(wanted, group=context.cpu_group, group_src=0)
        if not wanted[0]:
            return
        with trainer.evaluating():
            loss = self._measure(trainer, trainer.resources.validation)
        if loss is not None:
            trainer.state.note_best("val_loss", loss, lower_is_better=True)
        if loss is not None and context.is_main:
            rows[-1]["val_loss"] = loss
            rewrite_rows(path, rows)

    def _measure(self, trainer: Trainer, samples: Samples) -> float | None:
        """The mean loss; None when a rank wants to stop, which all look at after each batch."""
        size = trainer.options.global_batch_size
        # Spread over the split, so that a few long documents do not stand for all of it.
        chosen = samples.spread(self._config.max_batches * size or len(samples))
        total = torch.zeros((), dtype=torch.float64, device=trainer.context.device)
        for start in range(0, len(chosen), size):
            batch = step_batch(
                samples,
                chosen[start : start + size],
                rank=trainer.context.data_rank,
                ranks=trainer.context.layout.data_ranks,
                micro_batch_size=trainer.resources.micro_batch_size,
                document_mask=trainer.resources.document_mask,
            )
            total += trainer.engine.losses(batch.micro_batches)
            if trainer.agree_on_stop() is not None:
                return None
        if trainer.context.world_size > 1:
            dist.all_reduce(total)
        return float(total.item()) / max(1, int(samples.labels(chosen).sum()))
