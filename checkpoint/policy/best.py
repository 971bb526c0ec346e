"""Which of several measured values is best: the one place that decides it, for saving, keeping and listing."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self, final

from regrow.checkpoint.config import BestMetricConfig

__all__ = ["BestMetric"]


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class BestMetric:
    """A metric and the direction in which it gets better.

    Attributes:
        metric: its name among the measured values.
        lower_is_better: smaller values are better.
    """

    metric: str = "val_loss"
    lower_is_better: bool = True

    @classmethod
    def from_config(cls, config: BestMetricConfig) -> Self:
        """The same as the config says."""
        return cls(metric=config.metric, lower_is_better=config.lower_is_better)

    def improves(self, value: float | None, best: float | None) -> bool:
        """Whether `value` beats `best`: NaN and nothing never do, and any number beats nothing."""
        if value is None or math.isnan(value):
            return False
        if best is None:
            return True
        return value < best if self.lower_is_better else value > best

    def best_step(self, measured: Iterable[tuple[int, Mapping[str, float]]]) -> int | None:
        """The step with the best value, the earlier one of two equals; None where none was measured.

        Args:
            measured: steps, ascending, with their metrics.
        """
        found: int | None = None
        best: float | None = None
        for step, metrics in measured:
            value = metrics.get(self.metric)
            if self.improves(value, best):
                found, best = step, value
        return found
