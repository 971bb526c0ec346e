"""When to save: pure decisions on values that all ranks agree on, combined with "any"."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

from regrow.checkpoint.config import MinutesConfig, OnBestConfig
from regrow.checkpoint.policy.best import BestMetric
from regrow.errors import ConfigError

__all__ = [
    "EveryMinutes",
    "EveryNSteps",
    "FirstStep",
    "LastStep",
    "OnBest",
    "OnStop",
    "SaveContext",
    "SavePolicy",
    "save_reasons",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveContext:
    """What a policy may look at; equal on all ranks.

    Attributes:
        step: the optimizer step just finished.
        last_step: the step at which the run ends.
        stopping: the run ends after this step because it was asked to.
        seconds_since_save: on rank 0's clock, as shared with the others.
        metrics: values that were measured at this very step, for instance `val_loss`.
        best: the best value of each metric before this step.
    """

    step: int
    last_step: int
    stopping: bool = False
    seconds_since_save: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    best: Mapping[str, float] = field(default_factory=dict)


class SavePolicy(ABC):
    """One reason to save."""

    name: str

    @abstractmethod
    def due(self, context: SaveContext) -> bool:
        """Whether a checkpoint of `context.step` is wanted."""


@final
class EveryNSteps(SavePolicy):
    """Every `n` optimizer steps."""

    def __init__(self, n: int) -> None:
        self.name = f"every {n} steps"
        self.n = n

    def due(self, context: SaveContext) -> bool:
        return context.step % self.n == 0


@final
class FirstStep(SavePolicy):
    """After step 1."""

    name = "first step"

    def due(self, context: SaveContext) -> bool:
        return context.step == 1


@final
class LastStep(SavePolicy):
    """At the end of the run."""

    name = "last step"

    def due(self, context: SaveContext) -> bool:
        return context.step >= context.last_step


@final
class OnStop(SavePolicy):
    """When the run was asked to stop: preemption, a time limit, Ctrl-C."""

    name = "stop requested"

    def due(self, context: SaveContext) -> bool:
        return context.stopping


@final
class EveryMinutes(SavePolicy):
    """When so much time has passed since the last save."""

    def __init__(self, config: MinutesConfig) -> None:
        if config.minutes <= 0:
            raise ConfigError(f"checkpoint.save_policies.*.minutes must be above 0, but is {config.minutes}; use 30")
        self.name = f"every {config.minutes:g} minutes"
        self.seconds = config.minutes * 60

    def due(self, context: SaveContext) -> bool:
        return context.seconds_since_save >= self.seconds


@final
class OnBest(SavePolicy):
    """When a metric reached its best value at this step."""

    def __init__(self, config: OnBestConfig) -> None:
        self.name = f"best {config.best.metric}"
        self.best = BestMetric.from_config(config.best)

    def due(self, context: SaveContext) -> bool:
        metric = self.best.metric
        return self.best.improves(context.metrics.get(metric), context.best.get(metric))


def save_reasons(policies: Sequence[SavePolicy], context: SaveContext) -> list[str]:
    """The names of the policies that want this step saved; empty: don't save."""
    return [policy.name for policy in policies if policy.due(context)]
