"""Warm-up–stable–decay, cosine and linear schedules.

All of them rise in a straight line to 1, which they reach at the end of the warm-up, never rise again, and are at
`min_lr_ratio` at their last step and from there on. Where the warm-up and what follows it do not fit into a schedule,
`_peak` and `decay_start` say what gives way. A schedule of a single step trains that step at 1.
"""

import math
from typing import final

from regrow.errors import ConfigError
from regrow.trainer.config import SchedulerConfig
from regrow.trainer.schedules.base import Schedule
from regrow.trainer.schedules.config import CosineConfig, LinearConfig, WSDConfig

__all__ = ["Cosine", "Linear", "WarmupStableDecay"]


def check_schedule(config: SchedulerConfig) -> None:
    """Raises ConfigError where a common field is out of its range."""
    if config.warmup_steps < 0:
        raise ConfigError(f"scheduler.warmup_steps must be at least 0, but is {config.warmup_steps}; use 0")
    if not 0 <= config.min_lr_ratio <= 1:
        raise ConfigError(f"scheduler.min_lr_ratio must be within 0 and 1, but is {config.min_lr_ratio}; use 0.1")
    if config.total_steps is not None and config.total_steps < 1:
        raise ConfigError(f"scheduler.total_steps must be at least 1 or null, but is {config.total_steps}; use null")


def _peak(warmup_steps: int, total: int) -> int:
    """The step at which the warm-up ends; without a warm-up, the first.

    A warm-up that would leave no step for the decay takes the first tenth instead.
    """
    return max(1, warmup_steps if warmup_steps < total else total // 10)


def _warmup(step: int, peak: int) -> float:
    """Linear to 1."""
    return min(1.0, step / peak)


def _progress(step: int, start: float, total: int) -> float:
    """How far `step` is between `start` (0) and `total` (1); a start at the end leaves its own step at 0."""
    if step <= start:
        return 0.0
    return 1.0 if step >= total else (step - start) / (total - start)


def _warmup_shortened(warmup_steps: int, total: int) -> str | None:
    if warmup_steps < total or warmup_steps <= 1:
        return None
    steps = _peak(warmup_steps, total)
    return (
        f"scheduler.warmup_steps ({warmup_steps}) does not fit into a schedule of {total} steps: the warm-up takes "
        f"{steps} of them instead; to train the beginning of a longer run, give scheduler.total_steps"
    )


@final
class WarmupStableDecay(Schedule):
    """Constant between warm-up and a linear decay (Hu et al. 2024, arXiv:2404.06395).

    Where the two would overlap, the decay begins at the end of the warm-up and is shorter. Without a decay
    (`decay_ratio=0`) the factor stays at 1.
    """

    def __init__(self, config: WSDConfig) -> None:
        check_schedule(config)
        if not 0 <= config.decay_ratio <= 1:
            raise ConfigError(f"scheduler.decay_ratio must be within 0 and 1, but is {config.decay_ratio}; use 0.2")
        self.config = config

    def decay_start(self, total: int) -> float:
        """The last step, or a point after it, at which the factor is 1."""
        # The shortest decay is one step.
        start = min(total * (1 - self.config.decay_ratio), total - 1)
        return max(start, _peak(self.config.warmup_steps, total))

    def factor(self, step: int, total: int) -> float:
        decay = 0.0 if self.config.decay_ratio == 0 else _progress(step, self.decay_start(total), total)
        return _warmup(step, _peak(self.config.warmup_steps, total)) * (1 - decay * (1 - self.config.min_lr_ratio))

    def shortened(self, total: int) -> str | None:
        warmup, ratio = self.config.warmup_steps, self.config.decay_ratio
        problem = _warmup_shortened(warmup, total)
        if problem is not None or ratio == 0 or warmup <= max(1.0, min(total * (1 - ratio), total - 1)):
            return problem
        return (
            f"scheduler.warmup_steps ({warmup}) and scheduler.decay_ratio ({ratio}) overlap in a schedule of {total} "
            f"steps: the decay takes the last {total - warmup} of them alone; lower one of the two to keep the other"
        )


@final
class Cosine(Schedule):
    """Cosine annealing without restarts (Loshchilov and Hutter 2017, arXiv:1608.03983)."""

    def __init__(self, config: CosineConfig) -> None:
        check_schedule(config)
        self.config = config

    def factor(self, step: int, total: int) -> float:
        low, peak = self.config.min_lr_ratio, _peak(self.config.warmup_steps, total)
        wave = low + (1 - low) * 0.5 * (1 + math.cos(math.pi * _progress(step, peak, total)))
        return _warmup(step, peak) * wave

    def shortened(self, total: int) -> str | None:
        return _warmup_shortened(self.config.warmup_steps, total)


@final
class Linear(Schedule):
    """From 1 to `min_lr_ratio` in a straight line."""

    def __init__(self, config: LinearConfig) -> None:
        check_schedule(config)
        self.config = config

    def factor(self, step: int, total: int) -> float:
        peak = _peak(self.config.warmup_steps, total)
        return _warmup(step, peak) * (1 - _progress(step, peak, total) * (1 - self.config.min_lr_ratio))

    def shortened(self, total: int) -> str | None:
        return _warmup_shortened(self.config.warmup_steps, total)
