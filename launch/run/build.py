"""From typed config to objects."""

# mypy has no type for "a class that may be abstract", which is what a field asks for (PEP 747 would bring it).
# mypy: disable-error-code="type-abstract"

from pathlib import Path

import torch

from regrow.checkpoint.config import BestMetricConfig, CheckpointConfig
from regrow.checkpoint.convert.conversion_plan import size_in_bytes
from regrow.checkpoint.load.initial_load import LoadRules
from regrow.checkpoint.policy.retention import KeepLatest, RetentionRule
from regrow.checkpoint.policy.save import EveryNSteps, FirstStep, LastStep, OnStop, SavePolicy
from regrow.checkpoint.storage.base import Storage
from regrow.checkpoint.storage.opening import is_url, open_storage
from regrow.errors import ConfigError
from regrow.launch.config.resolve import checking, construct, resolve
from regrow.launch.config.schema import Config
from regrow.launch.run.hook_order import hook_order
from regrow.launch.run.weights import OpenedWeights, open_weights
from regrow.models.base import LanguageModel
from regrow.models.hf import HfKey, family_of
from regrow.trainer.config import PrecisionName
from regrow.trainer.data.config import DataConfig
from regrow.trainer.data.source import Source
from regrow.trainer.hf_folder import HfExport
from regrow.trainer.hook import Hook
from regrow.trainer.optimizer import Optimizer, RoundingOptimizer
from regrow.trainer.schedules.base import Schedule

__all__ = [
    "build_hooks",
    "build_model",
    "build_optimizer",
    "build_schedule",
    "build_source",
    "check_kinds",
    "check_optimizer",
    "checkpoint_folder",
    "export_folder",
    "hf_export",
    "hf_keys",
    "open_initial",
    "policies",
    "rules",
    "tracked_metrics",
]


def check_kinds(config: Config) -> None:
    """Whether the classes that nothing is made of before the ranks start, or the data is read, are of the right kind.

    Raises:
        ConfigError: one is not.
    """
    resolve(config.model._target_, "model", LanguageModel)
    resolve(config.data._target_, "data", Source)


def build_model(config: Config) -> LanguageModel:
    """The model, on whatever torch's default device is."""
    return construct(config.model._target_, "model", LanguageModel, config.model)


def hf_keys(config: Config) -> list[HfKey]:
    """The model's tensors in Hugging Face's layout; raises ValueError for a family or a model without one."""
    family = family_of(config.model)
    # What cannot be described there is refused now rather than at the export.
    family.describe(config.model)
    return family.keys(config.model)


def open_initial(config: Config, path: str, *, find_copies: bool = False) -> OpenedWeights:
    """The checkpoint that a run starts from, under our names.

    Args:
        config: the run's.
        path: of the checkpoint; or a URL.
        find_copies: see `open_weights`.

    Raises:
        CheckpointError: it is not there, or cannot be read.
    """
    place = open_storage(path, config.checkpoint.storage_options)
    renamed = LoadRules.from_config(config.checkpoint, ()).rename
    return open_weights(place, config.model, renamed, find_copies=find_copies)


def build_source(data: DataConfig, field: str = "data") -> Source:
    """A data source.

    Args:
        data: its config.
        field: the section that it is in.
    """
    return construct(data._target_, field, Source, data)


def build_schedule(config: Config) -> Schedule:
    """The learning-rate schedule; raises ValueError for bad fields."""
    return construct(config.scheduler._target_, "scheduler", Schedule, config.scheduler)


def check_optimizer(config: Config) -> None:
    """Whether the optimizer's class takes its fields, and parameters of the run's precision.

    Raises:
        ConfigError: it does not.
    """
    kind = resolve(config.optimizer._target_, "optimizer", Optimizer)
    if config.precision.name is PrecisionName.bf16_params and not issubclass(kind, RoundingOptimizer):
        raise ConfigError(
            "optimizer must round stochastically with precision.name=bf16_params, where it would lose small updates, "
            f"but {config.optimizer._target_} does not; use optimizer=adamw or precision=bf16"
        )
    if config.train.offload_optimizer and config.precision.name is PrecisionName.bf16_params:
        raise ConfigError(
            "train.offload_optimizer must be false with precision.name=bf16_params, whose moments are half as large "
            "and are rounded where they lie, but is true; use precision=bf16 with it"
        )
    if config.train.offload_optimizer and not kind.OFFLOADS:
        raise ConfigError(
            f"train.offload_optimizer must be false with {config.optimizer._target_}, whose state stays on the "
            "device, but is true; use optimizer=adamw"
        )
    with checking():
        kind.check(config.optimizer)


def build_optimizer(config: Config, model: LanguageModel) -> Optimizer:
    """The optimizer of a model whose parameters have their memory.

    Raises:
        ConfigError: bad fields.
    """
    options = {"offload": True} if config.train.offload_optimizer else {}
    optimizer = construct(config.optimizer._target_, "optimizer", Optimizer, config.optimizer, model, **options)
    if config.precision.name is PrecisionName.bf16_params and isinstance(optimizer, RoundingOptimizer):
        optimizer.round_stochastically(config.seed)
    return optimizer


def build_hooks(config: Config) -> list[Hook]:
    """The hooks in the order in which they run; each checks its fields.

    Raises:
        ValueError: one sentence, naming the field.
    """
    return [construct(hook._target_, f"hooks.{name}", Hook, hook) for name, hook in hook_order(config)]


def policies(config: CheckpointConfig) -> list[SavePolicy]:
    """Reasons to save; none where nothing is to be saved."""
    if not config.enable or config.load_only:
        return []
    found: list[SavePolicy] = [EveryNSteps(config.interval), LastStep(), OnStop()]
    if config.enable_first_step_checkpoint:
        found.append(FirstStep())
    if config.export.every_n:
        found.append(EveryNSteps(config.export.every_n))
    for name, policy in config.save_policies.items():
        found.append(construct(policy._target_, f"checkpoint.save_policies.{name}", SavePolicy, policy))
    return found


def rules(config: CheckpointConfig) -> list[RetentionRule]:
    """Reasons to keep a step."""
    found: list[RetentionRule] = [KeepLatest(config.keep_latest_k)]
    for name, rule in config.retention_rules.items():
        found.append(construct(rule._target_, f"checkpoint.retention_rules.{name}", RetentionRule, rule))
    return found


def tracked_metrics(config: CheckpointConfig) -> dict[str, bool]:
    """Metrics whose best value policies and rules ask for in their field `best`, and whether lower is better."""
    tracked = {"val_loss": True}
    for item in (*config.save_policies.values(), *config.retention_rules.values()):
        best = getattr(item, "best", None)
        if isinstance(best, BestMetricConfig):
            tracked[best.metric] = best.lower_is_better
    return tracked


def checkpoint_folder(config: Config, run_dir: Path) -> Storage:
    """Where the run's steps lie: below its directory, or below a URL in a folder of its name.

    Raises:
        ValueError: the URL cannot be opened.
        OSError: the place cannot be reached.
    """
    checkpoint = config.checkpoint
    if is_url(checkpoint.folder):
        return open_storage(f"{checkpoint.folder.rstrip('/')}/{config.run.name}", checkpoint.storage_options)
    return open_storage(run_dir / checkpoint.folder, direct_io=checkpoint.direct_io)


def export_folder(run_dir: Path) -> Path:
    """Where the run's Hugging Face folders lie."""
    return run_dir / "export"


def hf_export(config: Config, run_dir: Path) -> HfExport:
    """What a Hugging Face folder of this run holds beside the weights."""
    assets = config.model.hf_assets_path
    return HfExport(
        config=config.model,
        dtype=getattr(torch, config.checkpoint.export_dtype.name),
        max_shard_bytes=size_in_bytes(config.checkpoint.export.max_shard_size, "checkpoint.export.max_shard_size"),
        assets=None if assets is None else Path(assets).expanduser(),
        tokenizer=run_dir / "tokenizer.json",
    )
