"""Schemas of the learning-rate schedules."""

from dataclasses import dataclass
from typing import ClassVar

from regrow.trainer.config import SchedulerConfig

__all__ = ["CosineConfig", "LinearConfig", "WSDConfig"]


@dataclass(kw_only=True, slots=True)
class WSDConfig(SchedulerConfig):
    """Warm-up, stable, decay.

    Attributes:
        decay_ratio: the part of `total_steps` that the decay takes; 0 for none, a constant rate after the warm-up.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("scheduler", "wsd_schema")
    _target_: str = "regrow.trainer.schedules.shapes.WarmupStableDecay"
    decay_ratio: float = 0.2


@dataclass(kw_only=True, slots=True)
class CosineConfig(SchedulerConfig):
    """Half a cosine after the warm-up."""

    SCHEMA: ClassVar[tuple[str, str]] = ("scheduler", "cosine_schema")
    _target_: str = "regrow.trainer.schedules.shapes.Cosine"


@dataclass(kw_only=True, slots=True)
class LinearConfig(SchedulerConfig):
    """A straight line after the warm-up."""

    SCHEMA: ClassVar[tuple[str, str]] = ("scheduler", "linear_schema")
    _target_: str = "regrow.trainer.schedules.shapes.Linear"
