"""Garbage collection at fixed steps, so that ranks do not pause at different times."""

import gc
from typing import final

from regrow.errors import ConfigError
from regrow.trainer.hook import Hook
from regrow.trainer.hooks.config import GarbageConfig
from regrow.trainer.loop import Trainer

__all__ = ["GarbageCollectionHook"]


@final
class GarbageCollectionHook(Hook):
    """See `GarbageConfig`."""

    def __init__(self, config: GarbageConfig) -> None:
        if config.every < 1:
            raise ConfigError(f"hooks.garbage.every must be at least 1, but is {config.every}; use 50")
        self._every = config.every

    def before_fit(self, trainer: Trainer) -> None:
        gc.collect()
        gc.disable()

    def after_step(self, trainer: Trainer) -> None:
        if trainer.state.step % self._every == 0:
            gc.collect(1)

    def close(self, trainer: Trainer) -> None:
        gc.enable()
