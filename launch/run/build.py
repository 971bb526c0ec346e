"""From typed config to objects."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from regrow.checkpoint.config import CheckpointConfig
from regrow.checkpoint.convert.conversion_plan import size_in_bytes
from regrow.checkpoint.load.initial_load import LoadRules
from regrow.checkpoint.policy.retention import KeepLatest, RetentionRule
from regrow.checkpoint.policy.save import EveryNSteps, FirstStep, LastStep, OnStop, SavePolicy
from regrow.checkpoint.storage.base import Storage
from regrow.checkpoint.storage.opening import is_url, open_storage
from regrow.launch.config.resolve import resolve_target
from regrow.launch.config.schema import Config, Logger
from regrow.launch.run.weights import OpenedWeights, open_weights
from regrow.models.base import LanguageModel
from regrow.models.hf import HfKey, family_of
from regrow.trainer.data.source import Source
from regrow.trainer.hf_folder import HfExport
from regrow.trainer.hook import Hook
from regrow.trainer.schedules.base import Schedule

__all__ = [
    "build_hooks",
    "build_model",
    "build_optimizer_class",
    "build_schedule",
    "build_source",
    "hf_keys",
    "open_initial",
    "policies",
    "rules",
    "tracked_metrics",
]


def build_model(config: Config) -> LanguageModel:
    """The model, on whatever torch's default device is."""
    model: LanguageModel = resolve_target(config.model._target_, "model")(config.model)
    return model


def hf_keys(config: Config) -> list[HfKey]:
    """The model's tensors in Hugging Face's layout; raises ValueError for a family without one."""
    return family_of(config.model).keys(config.model)


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


def build_source(config: Config) -> Source:
    """The data source."""
    source: Source = resolve_target(config.data._target_, "data")(config.data)
    return source


def build_schedule(config: Config) -> Schedule:
    """The learning-rate schedule; raises ValueError for bad fields."""
    schedule: Schedule = resolve_target(config.scheduler._target_, "scheduler")(config.scheduler)
    return schedule


def build_optimizer_class(config: Config) -> Any:
    """The optimizer's class, called with (config, model); raises ValueError for bad fields."""
    kind = resolve_target(config.optimizer._target_, "optimizer")
    kind.check(config.optimizer)
    return kind


def build_hooks(config: Config) -> list[Hook]:
    """The optional hooks, in the order of the config."""
    return [
        resolve_target(hook._target_, f"hooks.{name}")(hook) for name, hook in config.hooks.items() if hook.enabled
    ]


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
        found.append(resolve_target(policy._target_, f"checkpoint.save_policies.{name}")(policy))
    return found


def rules(config: CheckpointConfig) -> list[RetentionRule]:
    """Reasons to keep a step."""
    found: list[RetentionRule] = [KeepLatest(config.keep_latest_k)]
    for name, rule in config.retention_rules.items():
        found.append(resolve_target(rule._target_, f"checkpoint.retention_rules.{name}")(rule))
    return found


def tracked_metrics(config: CheckpointConfig) -> dict[str, bool]:
    """Metrics whose best value is remembered, and whether lower is better."""
    tracked = {"val_loss": True}
    named: Sequence[Any] = [*config.save_policies.values(), *config.retention_rules.values()]
    for item in named:
        best = getattr(item, "best", None)
        if best is not None:
            tracked[best.metric] = best.lower_is_better
    return tracked


def uses_wandb(config: Config) -> bool:
    """Whether metrics go to Weights & Biases too."""
    return config.logger is Logger.wandb


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
