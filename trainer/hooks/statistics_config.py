"""The schema of statistics by module."""

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from regrow.trainer.config import HookConfig

__all__ = ["Grouping", "StatisticsConfig"]


class Grouping(Enum):
    """What is told together.

    Attributes:
        block: a whole block, and what stands beside the blocks.
        parameter: each parameter by itself.
    """

    block = "block"
    parameter = "parameter"


@dataclass(kw_only=True, slots=True)
class StatisticsConfig(HookConfig):
    """Norm, largest value, part of zeros and number of values that are not finite, by module: `statistics.jsonl`.

    Attributes:
        every: steps between rows; also after step 1.
        gradients: tell of gradients: of the whole batch, before they are clipped.
        weights: tell of weights, as the step's forward pass had them.
        activations: tell of activations: what blocks give, over the whole batch.
        by: what is told together; activations are always those of blocks.
        in_metrics: the norms stand in the row of metrics too, and reach the loggers.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("hook", "statistics_schema")
    _target_: str = "regrow.trainer.hooks.statistics.StatisticsHook"
    every: int = 100
    gradients: bool = True
    weights: bool = True
    activations: bool = True
    by: Grouping = Grouping.block
    in_metrics: bool = False
