"""Settings of the optimizer."""

from dataclasses import dataclass
from typing import ClassVar

from regrow.trainer.config import OptimizerConfig

__all__ = ["LionConfig"]


@dataclass(kw_only=True, slots=True)
class LionConfig(OptimizerConfig):
    """Lion (Chen et al. 2023, arXiv:2302.06675); `lr` is three to ten times smaller than AdamW's.

    Attributes:
        beta1: what the momentum counts in a step's direction.
        beta2: what of the momentum is kept.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("optimizer", "lion_schema")

    _target_: str = "regrow.launch.template.mylab.optimizer.lion.Lion"
    beta1: float = 0.9
    beta2: float = 0.99
