"""Schemas of the optional hooks that come with Regrow."""

from dataclasses import dataclass, field
from typing import ClassVar

from regrow.trainer.config import HookConfig

__all__ = ["GarbageConfig", "PlotConfig", "SampleConfig", "ValidationConfig"]


@dataclass(kw_only=True, slots=True)
class ValidationConfig(HookConfig):
    """Loss on the held-out documents.

    Attributes:
        every: steps between validations; also after step 1 and the last step.
        max_batches: global batches a validation, spread over the split; 0 is all.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("hook", "validation_schema")
    _target_: str = "regrow.trainer.hooks.validation.ValidationHook"
    every: int = 100
    max_batches: int = 10


@dataclass(kw_only=True, slots=True)
class SampleConfig(HookConfig):
    """Text generated when the run ends.

    Attributes:
        prompts: beginnings to continue.
        tokens: to generate for each.
        temperature: 0 always takes the likeliest token.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("hook", "sample_schema")
    _target_: str = "regrow.trainer.hooks.sample.SampleHook"
    prompts: list[str] = field(default_factory=lambda: ["The"])
    tokens: int = 64
    temperature: float = 0.7


@dataclass(kw_only=True, slots=True)
class GarbageConfig(HookConfig):
    """Python's garbage collector, run at the same steps on all ranks instead of whenever it likes.

    Attributes:
        every: steps between collections.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("hook", "garbage_schema")
    _target_: str = "regrow.trainer.hooks.garbage.GarbageCollectionHook"
    every: int = 50


@dataclass(kw_only=True, slots=True)
class PlotConfig(HookConfig):
    """A picture of the loss, `loss.png`, when the run ends."""

    SCHEMA: ClassVar[tuple[str, str]] = ("hook", "plot_schema")
    _target_: str = "regrow.trainer.hooks.plot.PlotHook"
