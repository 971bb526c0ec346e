"""Which steps to keep: rules protect, what no rule protects may go. Pure; the caller removes."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

from regrow.checkpoint.config import KeepBestConfig, KeepEveryNConfig
from regrow.checkpoint.policy.best import BestMetric
from regrow.errors import ConfigError

__all__ = ["KeepBest", "KeepEveryN", "KeepLatest", "RetainableStep", "RetentionRule", "removable_steps"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RetainableStep:
    """A committed step as retention sees it.

    Attributes:
        step: its number.
        pinned: a user asked for it to stay.
        metrics: what was measured at that step.
    """

    step: int
    pinned: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)


class RetentionRule(ABC):
    """One reason to keep steps."""

    @abstractmethod
    def protects(self, steps: Sequence[RetainableStep]) -> set[int]:
        """The numbers of the steps that must stay; `steps` are ascending."""


@final
class KeepLatest(RetentionRule):
    """The newest `k` steps; 0 keeps all."""

    def __init__(self, k: int) -> None:
        self.k = k

    def protects(self, steps: Sequence[RetainableStep]) -> set[int]:
        return {s.step for s in (steps[-self.k :] if self.k else steps)}


@final
class KeepEveryN(RetentionRule):
    """Every step that is a multiple of `n`."""

    def __init__(self, config: KeepEveryNConfig) -> None:
        if config.n < 1:
            raise ConfigError(f"checkpoint.retention_rules.*.n must be at least 1, but is {config.n}; use 10000")
        self.n = config.n

    def protects(self, steps: Sequence[RetainableStep]) -> set[int]:
        return {s.step for s in steps if s.step % self.n == 0}


@final
class KeepBest(RetentionRule):
    """The step with the best value of a metric; the earlier one of two equals."""

    def __init__(self, config: KeepBestConfig) -> None:
        self.best = BestMetric.from_config(config.best)

    def protects(self, steps: Sequence[RetainableStep]) -> set[int]:
        best = self.best.best_step((s.step, s.metrics) for s in steps)
        return set() if best is None else {best}


def removable_steps(rules: Sequence[RetentionRule], steps: Sequence[RetainableStep]) -> list[int]:
    """The steps that may be removed, ascending: never the newest, a pinned or a protected one."""
    ordered = sorted(steps, key=lambda s: s.step)
    if not ordered:
        return []
    keep = {ordered[-1].step} | {s.step for s in ordered if s.pinned}
    for rule in rules:
        keep |= rule.protects(ordered)
    return [s.step for s in ordered if s.step not in keep]
