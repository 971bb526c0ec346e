"""Everything that can be refused before a rank starts: one sentence each."""

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from regrow.checkpoint.config import CheckpointConfig, FinetuneConfig
from regrow.checkpoint.convert.conversion_plan import size_in_bytes
from regrow.checkpoint.errors import CheckpointError
from regrow.checkpoint.format.tensor_source import TensorSource
from regrow.checkpoint.load.initial_load import LoadPlan, LoadRules, check_load, check_moments, stored_step
from regrow.checkpoint.policy.lineage import LoadRequest, StartPoint
from regrow.checkpoint.run.lease import LONGEST_TIMEOUT_S
from regrow.checkpoint.storage.opening import is_url, open_storage
from regrow.errors import ConfigError
from regrow.launch.config.errors import check_no_hub_name
from regrow.launch.config.resolve import checking
from regrow.launch.config.schema import Config
from regrow.launch.run.build import (
    build_hooks,
    build_model,
    build_schedule,
    check_kinds,
    check_optimizer,
    hf_keys,
    open_initial,
    policies,
    rules,
)
from regrow.launch.run.ranks import detect_ranks
from regrow.launch.run.weights import buffers_of, contradictions, shapes_of, vocabulary_of
from regrow.models.config import DecoderConfig
from regrow.models.hf import CONFIG, HEAD
from regrow.torch_compat import splits_backward
from regrow.trainer.parallel.layout import Layout
from regrow.trainer.parallel.plan_rules import check_plan
from regrow.trainer.parallel.rules import Batch, check_attention, check_layout
from regrow.trainer.precision import change_parameters, check_precision

__all__ = [
    "check_config",
    "check_disk",
    "check_initial_load",
    "check_launch",
    "check_parallel",
    "check_seed",
]

log = logging.getLogger(__name__)


def check_config(config: Config) -> None:
    """Checks that need neither files nor devices.

    Raises:
        ConfigError: naming field, rule, value and remedy.
    """
    check_kinds(config)
    with checking():
        config.model.check()
    _at_least(config.train.steps, 1, "train.steps", "100")
    _at_least(config.train.log_every, 1, "train.log_every", "10")
    _at_least(config.train.grad_clip, 0, "train.grad_clip", "1.0")
    _at_least(config.train.z_loss, 0, "train.z_loss", "1e-4")
    _at_least(config.data.seq_len, 1, "data.seq_len", "256")
    _at_least(config.data.global_batch_size, 1, "data.global_batch_size", "16")
    _at_least(config.data.micro_batch_size, 1, "data.micro_batch_size", "1")
    _at_least(config.seed, 0, "seed", "0")
    _at_least(config.data.workers, 0, "data.workers", "0")
    _at_least(config.data.prefetch, 1, "data.prefetch", "2")
    _at_least(config.launch.timeout_s, 1, "launch.timeout_s", "600")
    _at_least(config.launch.max_restarts, 0, "launch.max_restarts", "0")
    _at_least(config.launch.threads_per_rank, 0, "launch.threads_per_rank", "0")
    if not 0 <= config.data.validation_fraction < 1:
        raise ConfigError(
            "data.validation_fraction must be at least 0 and below 1, but is "
            f"{config.data.validation_fraction}; use 0.05"
        )
    if config.data.seq_len > config.model.max_seq_len:
        raise ConfigError(
            f"data.seq_len must be at most model.max_seq_len ({config.model.max_seq_len}), which RoPE was made "
            f"for, but is {config.data.seq_len}; use {config.model.max_seq_len} or less"
        )
    if not config.run.name or "/" in config.run.name or config.run.name.startswith("."):
        raise ConfigError(f"run.name must be a folder's name, but is {config.run.name!r}; use run.root for folders")
    _check_checkpoint(config.checkpoint)
    if config.model.load_weights and not config.checkpoint.enable:
        raise ConfigError(
            "checkpoint.enable must be true to start from the weights of model.path, but is false; use "
            "checkpoint.load_only=true to save nothing, or model.load_weights=false"
        )
    if config.checkpoint.last_save_in_hf or config.checkpoint.export.every_n:
        hf_keys(config)
    build_schedule(config)
    check_optimizer(config)
    build_hooks(config)


def _at_least(value: float, low: float, name: str, remedy: str) -> None:
    if value < low:
        raise ConfigError(f"{name} must be at least {low:g}, but is {value:g}; use {remedy}")


def _check_checkpoint(config: CheckpointConfig) -> None:
    if config.initial_load_path is not None and not config.enable:
        raise ConfigError(
            f"checkpoint.enable must be true to start from checkpoint.initial_load_path ({config.initial_load_path}),"
            " but is false; use checkpoint.load_only=true to save nothing"
        )
    if config.create_seed_checkpoint and not config.enable:
        raise ConfigError(
            "checkpoint.enable must be true with checkpoint.create_seed_checkpoint, but is false; use checkpoint=seed"
        )
    LoadRules.from_config(config, ())
    _at_least(config.export.every_n, 0, "checkpoint.export.every_n", "1000")
    size_in_bytes(config.export.max_shard_size, "checkpoint.export.max_shard_size")
    _at_least(config.interval, 1, "checkpoint.interval", "500")
    _at_least(config.keep_latest_k, 0, "checkpoint.keep_latest_k", "10")
    if config.load_step < -1:
        raise ConfigError(f"checkpoint.load_step must be -1 or a step, but is {config.load_step}; use -1")
    folder = Path(config.folder)
    if not is_url(config.folder) and (folder.is_absolute() or ".." in folder.parts or not folder.parts):
        raise ConfigError(
            f"checkpoint.folder must be below the run or a URL, but is {config.folder!r}; use checkpoint"
        )
    LoadRequest.from_config(config)
    policies(config)
    rules(config)
    _at_least(config.max_save_errors, 1, "checkpoint.max_save_errors", "5")
    _at_least(config.files_per_rank, 1, "checkpoint.files_per_rank", "1")
    _at_least(config.commit_timeout_s, 1, "checkpoint.commit_timeout_s", "600")
    _at_least(config.lease_timeout_s, 1, "checkpoint.lease_timeout_s", "60")
    if config.lease_timeout_s > LONGEST_TIMEOUT_S:
        raise ConfigError(
            f"checkpoint.lease_timeout_s must be at most {LONGEST_TIMEOUT_S:g}, but is {config.lease_timeout_s:g}; "
            "use 60"
        )
    if isinstance(config, FinetuneConfig) and config.initial_load_path is None:
        raise ConfigError(
            "checkpoint.initial_load_path must be set with checkpoint=finetune, but is null; "
            "add checkpoint.initial_load_path=PATH"
        )


def check_parallel(config: Config, layout: Layout, device_type: str) -> None:
    """Whether the degrees fit each other, the model and the batch, and the precision the devices.

    Raises:
        ConfigError: naming field, rule, value and remedy.
    """
    check_layout(
        layout,
        config.parallel,
        config.model,
        Batch(
            global_batch_size=config.data.global_batch_size,
            micro_batch_size=config.data.micro_batch_size,
            seq_len=config.data.seq_len,
        ),
        train=config.train,
        device_type=device_type,
        splits_backward=splits_backward(),
    )
    if layout.tp > 1 and isinstance(config.model, DecoderConfig):
        with torch.device("meta"):
            check_plan(build_model(config), config.model, layout.tp)
    check_attention(config.model, config.precision.name, device_type)
    check_precision(config.precision, device_type)


def check_seed(environ: Mapping[str, str]) -> None:
    """Whether this process is alone.

    Raises:
        ConfigError: torchrun started several.
    """
    ranks = detect_ranks(environ, None)
    if ranks is not None and ranks.world_size > 1:
        raise ConfigError(
            f"checkpoint.create_seed_checkpoint must be run by 1 process, but {ranks.world_size} were started; start "
            "one"
        )


def check_launch(layout: Layout, device_type: str, *, ranks_are_given: bool) -> None:
    """Whether the ranks can be started here.

    Raises:
        ConfigError: more ranks than GPUs.
    """
    if device_type == "cuda" and not ranks_are_given and layout.world_size > torch.cuda.device_count():
        raise ConfigError(
            f"the product of the parallel degrees must be at most the number of GPUs "
            f"({torch.cuda.device_count()}), but is {layout.world_size}; use parallel.dp_shard=-1"
        )


def check_initial_load(config: Config, start: StartPoint) -> LoadPlan:
    """Whether the checkpoint to start from is there and fits the model; says what will be left out.

    Raises:
        CheckpointError: it is not, or does not.
    """
    assert start.path is not None
    check_no_hub_name("checkpoint.initial_load_path", start.path)
    shapes = shapes_of(config.model)
    opened = open_initial(config, start.path, find_copies=True)
    with opened.source as source:
        plan = check_load(
            source,
            shapes,
            LoadRules.from_config(config.checkpoint, vocabulary_of(config.model)),
            unused=opened.unused,
            beside=(*opened.same, *buffers_of(config.model)),
            idle_rules=opened.idle_rules,
            remedies=_remedies(config),
        )
        # Only now: setting the field as the sentence says leads to the load that was just looked at.
        if opened.in_hf is not start.in_hf:
            whose, value = ("Hugging Face's", "true") if opened.in_hf else ("not Hugging Face's", "false")
            raise CheckpointError(
                f"checkpoint.initial_load_in_hf must be {value} for {start.path}, whose tensors' names are {whose}, "
                f"but is {str(start.in_hf).lower()}; set checkpoint.initial_load_in_hf={value}"
            )
        if opened.in_hf:
            for line in contradictions(open_storage(start.path, config.checkpoint.storage_options), config.model):
                log.warning("initial load: %s", line)
        if not start.model_only:
            _check_state(config, start, source, {n: shapes[n] for n in plan.found})
    return plan


def _check_state(
    config: Config, start: StartPoint, source: TensorSource, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Whether optimizer and counters can come from there too."""
    if "optimizer" not in start.exclude:
        check_moments(source, shapes)
    step = stored_step(source)
    if step is None:
        raise CheckpointError(
            f"checkpoint.initial_load_model_only must be true for {source.place}, which does not say at which step "
            "it was saved, but is false; leave it out"
        )
    if config.train.steps <= step:
        raise CheckpointError(
            f"train.steps must be above the step of {source.place} ({step}) to go on from it, but is "
            f"{config.train.steps}; raise it, or use checkpoint.initial_load_model_only=true to begin at step 0"
        )


def _remedies(config: Config) -> dict[str, str]:
    """What to do where the output layer is there or not, against the model's config."""
    if not isinstance(config.model, DecoderConfig):
        return {}
    other = str(not config.model.tied_embeddings).lower()
    remedy = f"use model.tied_embeddings={other}"
    if config.model.load_weights:
        # The config is the folder's.
        remedy = f"set tie_word_embeddings to {other} in its {CONFIG}"
    return {HEAD.name: remedy, HEAD.hf_name: remedy}


def check_disk(config: Config, run_dir: Path) -> None:
    """Whether the run's folder can be written and one checkpoint fits.

    Raises:
        ConfigError: it cannot or does not.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    probe = run_dir / f".probe-{os.getpid()}"
    probe.touch()
    probe.unlink(missing_ok=True)
    if not config.checkpoint.enable or config.checkpoint.load_only or is_url(config.checkpoint.folder):
        return
    with torch.device("meta"):
        model = build_model(config)
    change_parameters(model, config.precision.name)
    weights = sum(p.numel() * p.itemsize for p in model.parameters())
    # Weights and two moments of the same type, and a little for metadata.
    needed = weights * (1 if config.checkpoint.create_seed_checkpoint else 3) + (1 << 20)
    free = shutil.disk_usage(run_dir).free
    if needed > free:
        raise ConfigError(
            f"run.root must have room for one checkpoint ({needed / 2**20:,.0f} MiB), but {run_dir} has "
            f"{free / 2**20:,.0f} MiB free; free some or choose another run.root"
        )
