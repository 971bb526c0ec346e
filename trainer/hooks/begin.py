"""What a start changes in the run's directory, once its state is loaded, and what it says of the run."""

import logging
from math import prod
from typing import final

import torch
import torch.distributed as dist

from regrow.checkpoint.format.layout import chunk_of
from regrow.trainer.hook import Hook
from regrow.trainer.hooks.config import BeginConfig
from regrow.trainer.hooks.on_main import run_on_main
from regrow.trainer.loop import Trainer
from regrow.trainer.named_tensors import full_state
from regrow.trainer.resources import Started

__all__ = ["BeginHook"]

log = logging.getLogger(__name__)


@final
class BeginHook(Hook):
    """See `BeginConfig`. Says the banner. First: the others' `before_fit` finds the run as this start has made it.

    A start that is refused while the state is loaded has then changed nothing.
    """

    def __init__(self, config: BeginConfig) -> None:
        self._config = config

    def before_fit(self, trainer: Trainer) -> None:
        run_on_main(trainer.context, trainer.resources.begin)
        step_bytes = _step_bytes(trainer) if trainer.resources.checkpoint is not None else 0
        if trainer.context.is_main:
            source = trainer.restorer.source if trainer.restorer is not None else "fresh weights"
            started = Started(
                source=f"state: {source}",
                step=trainer.state.step,
                schedule_total=trainer.state.schedule_total,
                step_bytes=step_bytes,
            )
            for line in trainer.resources.banner(started):
                log.info("%s", line)


def _step_bytes(trainer: Trainer) -> int:
    """Of a full step's tensors, over all ranks; every rank calls it."""
    tensors, owner_ranks = full_state(trainer.engine, trainer.optimizer, trainer.state)
    rank, own = trainer.context.rank, 0
    for name, tensor in tensors.items():
        if rank == min(owner_ranks.get(name, (0,))):
            own += prod(chunk_of(name, tensor).global_shape) * tensor.itemsize
    total = torch.tensor(own)
    dist.all_reduce(total, group=trainer.context.cpu_group)
    return int(total)
