"""Warm-up–stable–decay, cosine and linear schedules."""

import math
from typing import final

from trainer.config import SchedulerConfig
from trainer.schedules.base import Schedule
from trainer.schedules.config import CosineConfig, LinearConfig, WSDConfig

__all__ = ["Cosine", "Linear", "WarmupStableDecay"]


def check_schedule(config: SchedulerConfig) -> None:
    """Raises ValueError where a common field is out of its range."""
    if config.warmup_steps < 0:
        raise ValueError(f"scheduler.warmup_steps must be at least 0, but is {config.warmup_steps}; use 0")
    if not 0 <= config.min_lr_ratio <= 1:
        raise ValueError(f"scheduler.min_lr_ratio must be within 0 and 1, but is {config.min_lr_ratio}; use 0.1")
    if config.total_steps is not None and config.total_steps < 1:
        raise ValueError(f"scheduler.total_steps must be at least 1 or null, but is {config.total_steps}; use null")


def _warmup(step: int, total: int, warmup_steps: int) -> float:
    """Linear to 1; a schedule shorter than its warm-up warms up over its first tenth."""
    steps = warmup_steps if warmup_steps < total else max(1, total // 10)
    return min(1.0, step / steps) if steps else 1.0


def _progress(step: int, start: float, total: int) -> float:
    """How far `step` is between `start` (0) and `total` (1)."""
    return min(1.0, max(0.0, (step - start) / max(1.0, total - start)))


@final
class WarmupStableDecay(Schedule):
    """Constant between warm-up and a linear decay (Hu et al. 2024, arXiv:2404.06395)."""

    def __init__(self, config: WSDConfig) -> None:
        check_schedule(config)
        if not 0 <= config.decay_ratio <= 1:
            raise ValueError(f"scheduler.decay_ratio must be within 0 and 1, but is {config.decay_ratio}; use 0.2")
        self.config = config

    def factor(self, step: int, total: int) -> float:
        decay = _progress(step, total * (1 - self.config.decay_ratio), total)
        return _warmup(step, total, self.config.warmup_steps) * (1 - decay * (1 - self.config.min_lr_ratio))


@final
class Cosine(Schedule):
    """Cosine annealing without restarts (Loshchilov and Hutter 2017, arXiv:1608.03983)."""

    def __init__(self, config: CosineConfig) -> None:
        check_schedule(config)
        self.config = config

    def factor(self, step: int, total: int) -> float:
        low = self.config.min_lr_ratio
        progress = _progress(step, min(self.config.warmup_steps, total), total)
        wave = low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))
        return _warmup(step, total, self.config.warmup_steps) * wave


@final
class Linear(Schedule):
    """From 1 to `min_lr_ratio` in a straight line."""

    def __init__(self, config: LinearConfig) -> None:
        check_schedule(config)
        self.config = config

    def factor(self, step: int, total: int) -> float:
        progress = _progress(step, min(self.config.warmup_steps, total), total)
        return _warmup(step, total, self.config.warmup_steps) * (1 - progress * (1 - self.config.min_lr_ratio))
