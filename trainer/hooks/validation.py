"""Loss on the validation split, the same under every layout."""

import logging
import math
from collections.abc import Collection
from typing import final

import torch
import torch.distributed as dist

from regrow.errors import ConfigError
from regrow.trainer.data.loader import step_batch
from regrow.trainer.data.samples import Samples
from regrow.trainer.hooks.config import ValidationConfig
from regrow.trainer.hooks.measuring import MeasuringHook
from regrow.trainer.loop import Trainer

__all__ = ["ValidationHook"]

log = logging.getLogger(__name__)


@final
class ValidationHook(MeasuringHook):
    """See `ValidationConfig`. Its results are the row's `val_loss`, in nats a label, and `val_bits_per_byte`; of
    `data.validation_sets` also `val_loss/NAME` and so on.
    """

    def __init__(self, config: ValidationConfig) -> None:
        if config.every < 1:
            raise ConfigError(f"hooks.validation.every must be at least 1, but is {config.every}; use 100")
        if config.max_batches < 0:
            raise ConfigError(
                f"hooks.validation.max_batches must be at least 0, but is {config.max_batches}; use 0 for all"
            )
        self._config = config

    def before_fit(self, trainer: Trainer) -> None:
        if not trainer.resources.validation[""] and trainer.context.is_main:
            log.warning("no document falls into the validation split: no val_loss; raise data.validation_fraction")
        super().before_fit(trainer)

    def due(self, trainer: Trainer) -> bool:
        step = trainer.state.step
        chosen = step % self._config.every == 0 or step in (1, trainer.options.steps)
        return bool(_measured(trainer)) and step > 0 and chosen

    def names(self, trainer: Trainer) -> Collection[str]:
        return [_metric("val_loss", name) for name in _measured(trainer)]

    def measure(self, trainer: Trainer) -> dict[str, float] | None:
        """The metrics of all sets; None when a rank wants to stop."""
        out: dict[str, float] = {}
        with trainer.evaluating():
            for name, samples in _measured(trainer).items():
                found = self._measure(trainer, samples)
                if found is None:
                    return None
                out[_metric("val_loss", name)], per_byte = found
                if per_byte is not None:
                    out[_metric("val_bits_per_byte", name)] = per_byte
        return out

    def _measure(self, trainer: Trainer, samples: Samples) -> tuple[float, float | None] | None:
        """The mean loss, and bits per byte where they are known; None when a rank wants to stop, which all look at
        after each batch.
        """
        context, size = trainer.context, trainer.options.global_batch_size
        # Spread over the split, so that a few long documents do not stand for all of it.
        chosen = samples.spread(self._config.max_batches * size or len(samples))
        total = torch.zeros((), dtype=torch.float64, device=context.device)
        read = 0
        for start in range(0, len(chosen), size):
            batch = step_batch(
                samples,
                chosen[start : start + size],
                rank=context.data_rank,
                ranks=context.layout.data_ranks,
                micro_batch_size=trainer.resources.micro_batch_size,
                document_mask=trainer.resources.document_mask,
            )
            total += trainer.engine.losses(batch.micro_batches)
            read += batch.label_bytes
            if trainer.agree_on_stop() is not None:
                return None
        sums = torch.stack([total, total.new_tensor(float(read if context.reads_first else 0))])
        if context.world_size > 1:
            dist.all_reduce(sums)
        loss, bytes_read = sums.tolist()
        per_byte = loss / math.log(2) / bytes_read if bytes_read else None
        return loss / max(1, int(samples.labels(chosen).sum())), per_byte


def _measured(trainer: Trainer) -> dict[str, Samples]:
    """The sets that hold something, by name."""
    return {name: samples for name, samples in trainer.resources.validation.items() if samples}


def _metric(kind: str, name: str) -> str:
    return f"{kind}/{name}" if name else kind
