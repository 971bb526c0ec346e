"""The checkpoint policy's fields; their names are those of torchtitan's `[checkpoint]` section."""

from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

from omegaconf import MISSING

__all__ = [
    "AsyncMode",
    "BestMetricConfig",
    "CheckpointConfig",
    "DirectIo",
    "ExportConfig",
    "ExportDtype",
    "FinetuneConfig",
    "KeepBestConfig",
    "KeepEveryNConfig",
    "MinutesConfig",
    "OnBestConfig",
    "OnSaveError",
    "RetentionRuleConfig",
    "SavePolicyConfig",
    "WhenBusy",
]

# `async` is a keyword, so the class syntax cannot spell these names.
AsyncMode = Enum(
    "AsyncMode", {"disabled": "disabled", "async": "async", "async_with_pinned_mem": "async_with_pinned_mem"}
)
AsyncMode.__doc__ = """How far a save has come when training goes on.

Attributes:
    disabled: the checkpoint is durable.
    async: the state is copied; the copy is written behind training.
    async_with_pinned_mem: nothing is done yet: the copy runs beside the next forward and backward pass.
"""


class ExportDtype(Enum):
    """The element type of a model-only last save and of exports.

    Attributes:
        float32: 4 bytes an element.
        bfloat16: 2 bytes, with float32's range.
        float16: 2 bytes, finer, but only up to 65,504.
    """

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class DirectIo(Enum):
    """Whether files are written past the page cache.

    Attributes:
        auto: where a first try shows that it works.
        on: always, without a try.
        off: never.
    """

    auto = "auto"
    on = "on"
    off = "off"


class WhenBusy(Enum):
    """What becomes of a save that is due while the one before is still being written.

    Attributes:
        wait: it waits for that one.
        skip: it is left out, but for the last step and a requested stop.
    """

    wait = "wait"
    skip = "skip"


OnSaveError = Enum("OnSaveError", {"continue": "continue", "stop": "stop"})
OnSaveError.__doc__ = """What a failed save does.

Attributes:
    continue: the run warns, goes on, and tries again when the next save is due.
    stop: the run ends.
"""


@dataclass(kw_only=True, slots=True)
class SavePolicyConfig:
    """One more reason to save, beside `interval`, the first and the last step; a subclass per policy.

    Attributes:
        _target_: the policy's class, called with this config.
    """

    _target_: str = MISSING


@dataclass(kw_only=True, slots=True)
class MinutesConfig(SavePolicyConfig):
    """Saves when `minutes` have passed on rank 0's clock since the last save.

    Attributes:
        minutes: minutes between saves.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("save_policy", "minutes_schema")
    _target_: str = "regrow.checkpoint.policy.save.EveryMinutes"
    minutes: float = 30.0


@dataclass(kw_only=True, slots=True)
class BestMetricConfig:
    """Which metric is best, and in which direction.

    Attributes:
        metric: its name in `metrics.jsonl`.
        lower_is_better: whether the lowest value is the best; false takes the highest.
    """

    metric: str = "val_loss"
    lower_is_better: bool = True


@dataclass(kw_only=True, slots=True)
class OnBestConfig(SavePolicyConfig):
    """Saves at a step that was validated and is the best so far.

    Attributes:
        best: which metric, and in which direction.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("save_policy", "on_best_schema")
    _target_: str = "regrow.checkpoint.policy.save.OnBest"
    best: BestMetricConfig = field(default_factory=BestMetricConfig)


@dataclass(kw_only=True, slots=True)
class RetentionRuleConfig:
    """One more reason to keep a step, beside `keep_latest_k` and pins; a subclass per rule.

    Attributes:
        _target_: the rule's class, called with this config.
    """

    _target_: str = MISSING


@dataclass(kw_only=True, slots=True)
class KeepEveryNConfig(RetentionRuleConfig):
    """Keeps every step that is a multiple of `n`.

    Attributes:
        n: optimizer steps; their multiples are kept.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("retention_rule", "every_n_schema")
    _target_: str = "regrow.checkpoint.policy.retention.KeepEveryN"
    n: int = 10_000


@dataclass(kw_only=True, slots=True)
class KeepBestConfig(RetentionRuleConfig):
    """Keeps the step with the best value of a metric.

    Attributes:
        best: which metric, and in which direction.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("retention_rule", "best_schema")
    _target_: str = "regrow.checkpoint.policy.retention.KeepBest"
    best: BestMetricConfig = field(default_factory=BestMetricConfig)


@dataclass(kw_only=True, slots=True)
class ExportConfig:
    """Hugging Face folders made during training, in `<run>/export/step-N/`.

    Attributes:
        every_n: export every so many steps, from the same snapshot as the step's checkpoint; 0 never does.
        max_shard_size: largest size of one safetensors file, like 5GB or 500MB.
    """

    every_n: int = 0
    max_shard_size: str = "5GB"


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """When to save, what, which steps to keep, and what to start from.

    Attributes:
        enable: save and resume at all.
        folder: where steps are kept: a folder below the run's directory, or a URL (`s3://bucket/prefix`, `gs://…`,
            whatever fsspec opens), below which the run's steps lie in a folder of the run's name.
        storage_options: for a URL: `endpoint`, `region` and the like; credentials come from the environment.
        interval: save every this many optimizer steps.
        enable_first_step_checkpoint: save after step 1 too, to find out early that saving works.
        last_save_model_only: the last step's save holds the weights alone.
        last_save_in_hf: the last step's save is a Hugging Face folder, `<run>/export/step-N/`, and no checkpoint.
        export_dtype: element type of a model-only last save and of exports.
        export: Hugging Face folders before the last step.
        async_mode: how far a save has come when training goes on.
        on_save_error: what a failed save does.
        max_save_errors: so many failed saves in a row end the run in any case.
        when_busy: what becomes of a save that is due while the one before is still being written.
        direct_io: whether files are written past the page cache.
        files_per_rank: a rank's share is written as so many files at once.
        commit_timeout_s: seconds; a step whose ranks have not all reported by then has failed.
        lease_timeout_s: seconds; a writer on another host whose lease has not moved for so long counts as dead; up to
            3600.
        keep_latest_k: newest steps to keep; 0 keeps all.
        load_only: resume, but never save.
        load_step: -1 for the newest, else the step to go back to; acts once.
        exclude_from_loading: what is left as a fresh run has it, of `optimizer`, `lr_scheduler`, `data_loader` (or
            `dataloader`); acts once.
        initial_load_path: a checkpoint to start a new run from; null starts afresh. Acts once.
        initial_load_model_only: take the weights alone from `initial_load_path`.
        initial_load_in_hf: `initial_load_path` is a Hugging Face folder; where it is null, `model.hf_assets_path`
            is.
        load_strict: an initial load must find every tensor of the model and use every weight; false lists what was
            not found and what was not used.
        load_rename: rules PATTERN=>REPLACEMENT (regular expressions) for the names in an initial load's checkpoint.
        load_resized: an initial load may have another vocabulary: rows that both have are loaded.
        create_seed_checkpoint: write step 0 on one process and exit.
        save_policies: further reasons to save, by a name of your choice.
        retention_rules: further reasons to keep a step, by a name of your choice.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("checkpoint", "checkpoint_schema")

    enable: bool = True
    folder: str = "checkpoint"
    storage_options: dict[str, str] = field(default_factory=dict)
    interval: int = 500
    enable_first_step_checkpoint: bool = False
    last_save_model_only: bool = False
    last_save_in_hf: bool = False
    export_dtype: ExportDtype = ExportDtype.float32
    export: ExportConfig = field(default_factory=ExportConfig)
    async_mode: AsyncMode = AsyncMode.async_with_pinned_mem
    on_save_error: OnSaveError = OnSaveError["continue"]
    max_save_errors: int = 5
    when_busy: WhenBusy = WhenBusy.wait
    direct_io: DirectIo = DirectIo.auto
    files_per_rank: int = 1
    commit_timeout_s: float = 600.0
    lease_timeout_s: float = 60.0
    keep_latest_k: int = 10
    load_only: bool = False
    load_step: int = -1
    exclude_from_loading: list[str] = field(default_factory=list)
    initial_load_path: str | None = None
    initial_load_model_only: bool = True
    initial_load_in_hf: bool = False
    load_strict: bool = True
    load_rename: list[str] = field(default_factory=list)
    load_resized: bool = False
    create_seed_checkpoint: bool = False
    save_policies: dict[str, SavePolicyConfig] = field(default_factory=dict)
    retention_rules: dict[str, RetentionRuleConfig] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class FinetuneConfig(CheckpointConfig):
    """A policy whose `initial_load_path` must be given: checked by type, since a merge replaces a missing value by
    one that is there.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("checkpoint", "finetune_schema")
