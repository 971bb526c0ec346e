"""Schemas of the hooks that come with Regrow."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from omegaconf import II

from regrow.trainer.config import HookConfig, HookStage, WandbConfig

__all__ = [
    "BeginConfig",
    "CheckpointHookConfig",
    "EvaluationConfig",
    "ExportHookConfig",
    "GarbageConfig",
    "MetricsConfig",
    "PlotConfig",
    "ProgressConfig",
    "RecordConfig",
    "SampleConfig",
    "SamplesConfig",
    "StartupConfig",
    "ThrottleConfig",
    "ValidationConfig",
    "WandbHookConfig",
]

# The section of the root config, wherever the hook stands.
_WANDB_SECTION: Any = II("wandb")


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
class EvaluationConfig(HookConfig):
    """What the model makes of tasks, while it trains and at the end.

    Attributes:
        tasks: files of tasks, and folders of them; see docs/evaluate.md.
        every: steps between evaluations; 0: at the given tokens and after the last step alone.
        at_tokens: tokens trained on, at the first step beyond each of which it is evaluated too.
        few_shot: items with their answers before each item; 0 for none.
        seed: seed of the choice of those items.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("hook", "evaluation_schema")
    _target_: str = "regrow.trainer.hooks.evaluation.EvaluationHook"
    tasks: list[str] = field(default_factory=list)
    every: int = 1000
    at_tokens: list[int] = field(default_factory=list)
    few_shot: int = 0
    seed: int = 0


@dataclass(kw_only=True, slots=True)
class SampleConfig(HookConfig):
    """Text generated when the run ends, and while it trains where that is asked for.

    Attributes:
        prompts: beginnings of texts to continue.
        tokens: tokens to generate for each prompt.
        temperature: 0 always takes the likeliest token.
        top_k: the likeliest tokens that may be drawn; 0 is no limit.
        top_p: the least part of the probability whose tokens may be drawn, likeliest first; 1 is no limit.
        every: steps between samples; 0 is at the end alone.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("hook", "sample_schema")
    _target_: str = "regrow.trainer.hooks.sample.SampleHook"
    prompts: list[str] = field(default_factory=lambda: ["The"])
    tokens: int = 64
    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 1.0
    every: int = 0


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


@dataclass(kw_only=True, slots=True)
class ThrottleConfig(HookConfig):
    """Holds every step up, to try out stops, preemption and resuming with a model that would be done too soon.

    Attributes:
        seconds: seconds added to each step.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("hook", "throttle_schema")
    _target_: str = "regrow.trainer.hooks.throttle.ThrottleHook"
    seconds: float = 1.0


@dataclass(kw_only=True, slots=True)
class BeginConfig(HookConfig):
    """Writes what a start changes in the run's directory, once its state is loaded, and says what the run is."""

    SCHEMA: ClassVar[tuple[str, str]] = ("hook", "begin_schema")
    _target_: str = "regrow.trainer.hooks.begin.BeginHook"
    stage: HookStage = HookStage.begin


@dataclass(kw_only=True, slots=True)
class MetricsConfig(HookConfig):
    """`metrics.jsonl`."""

    SCHEMA: ClassVar[tuple[str, str]] = ("hook", "metrics_schema")
    _target_: str = "regrow.trainer.hooks.metrics.MetricsHook"
    stage: HookStage = HookStage.write


@dataclass(kw_only=True, slots=True)
class SamplesConfig(HookConfig):
    """`samples.jsonl`, which windows each step was trained on; with `data.log_samples`."""

    SCHEMA: ClassVar[tuple[str, str]] = ("hook", "samples_schema")
    _target_: str = "regrow.trainer.hooks.metrics.SamplesHook"
    stage: HookStage = HookStage.write


@dataclass(kw_only=True, slots=True)
class ProgressConfig(HookConfig):
    """What the run is doing, drawn on a terminal; lines elsewhere. The log's file has a line for every step.

    Attributes:
        every: steps between lines where there is no terminal; `train.log_every` unless it is set here.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("hook", "progress_schema")
    _target_: str = "regrow.trainer.hooks.progress.ProgressHook"
    stage: HookStage = HookStage.write
    every: int = 10


@dataclass(kw_only=True, slots=True)
class WandbHookConfig(HookConfig):
    """Weights & Biases, with `logger=wandb`.

    Attributes:
        settings: W&B's settings; the section `wandb` unless they are set here.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("hook", "wandb_hook_schema")
    _target_: str = "regrow.trainer.hooks.wandb.WandbHook"
    stage: HookStage = HookStage.log
    settings: WandbConfig = _WANDB_SECTION


@dataclass(kw_only=True, slots=True)
class RecordConfig(HookConfig):
    """`run.json`, the run's own history."""

    SCHEMA: ClassVar[tuple[str, str]] = ("hook", "record_schema")
    _target_: str = "regrow.trainer.hooks.record.RecordHook"
    stage: HookStage = HookStage.record


@dataclass(kw_only=True, slots=True)
class ExportHookConfig(HookConfig):
    """Hugging Face folders while training goes on, with `checkpoint.export.every_n`."""

    SCHEMA: ClassVar[tuple[str, str]] = ("hook", "export_schema")
    _target_: str = "regrow.trainer.hooks.export.ExportHook"
    stage: HookStage = HookStage.save


@dataclass(kw_only=True, slots=True)
class CheckpointHookConfig(HookConfig):
    """Saves the run's state, with `checkpoint.enable`; the section `checkpoint` says when and how."""

    SCHEMA: ClassVar[tuple[str, str]] = ("hook", "checkpoint_hook_schema")
    _target_: str = "regrow.trainer.hooks.checkpoint.CheckpointHook"
    stage: HookStage = HookStage.save


@dataclass(kw_only=True, slots=True)
class StartupConfig(HookConfig):
    """One line on where the time before the first step went."""

    SCHEMA: ClassVar[tuple[str, str]] = ("hook", "startup_schema")
    _target_: str = "regrow.trainer.hooks.startup.StartupHook"
    stage: HookStage = HookStage.end
