"""Slow steps on purpose."""

import math
import time
from typing import final

from regrow.errors import ConfigError
from regrow.trainer.hook import Hook
from regrow.trainer.hooks.config import ThrottleConfig
from regrow.trainer.loop import Trainer

__all__ = ["ThrottleHook"]


@final
class ThrottleHook(Hook):
    """See `ThrottleConfig`."""

    def __init__(self, config: ThrottleConfig) -> None:
        if not (config.seconds >= 0 and math.isfinite(config.seconds)):
            raise ConfigError(f"hooks.throttle.seconds must be at least 0, but is {config.seconds}; use 1.0")
        self._seconds = config.seconds

    def before_step(self, trainer: Trainer) -> None:
        time.sleep(self._seconds)
