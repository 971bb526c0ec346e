"""From a config to what the ranks are told: everything that can be checked without them, and the data.

The command, `regrow.train`, the tests and the benchmarks prepare their runs here.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from regrow.launch.config.errors import naming_fields
from regrow.launch.config.identity import config_hash
from regrow.launch.config.later_fields import later_defaults
from regrow.launch.config.refusals import Refused, refusing
from regrow.launch.config.schema import Config, Device
from regrow.launch.config.typed import to_config, to_dict
from regrow.launch.run.preflight import (
    check_config,
    check_disk,
    check_launch,
    check_parallel,
    check_seed,
)
from regrow.launch.run.preflight_data import prepare_data
from regrow.launch.run.rank_spec import RankSpec
from regrow.launch.run.ranks import Ranks, detect_ranks, export_ranks, forget_ranks
from regrow.launch.run.threads import threads_per_rank
from regrow.launch.run.weights import as_stored
from regrow.torch_compat import can_compile
from regrow.trainer.config import ParallelConfig
from regrow.trainer.device import pick_device_type
from regrow.trainer.parallel.layout import Layout, resolve_layout
from regrow.trainer.parallel.memory_rules import compiles
from regrow.trainer.run_files import RECORD

__all__ = ["convert_config", "prepare_run"]


def prepare_run(
    config: DictConfig | Config,
    run_dir: Path | None = None,
    *,
    overrides: Sequence[str] = (),
    sweep: str | None = None,
    world_size: int | None = None,
) -> RankSpec:
    """Checks a run and prepares its data; nothing of the run itself is touched, beyond making its folder.

    Args:
        config: the root config, composed or typed.
        run_dir: the run's directory; by default `run.name` below `run.root`.
        overrides: the command line, which the run stores.
        sweep: the sweep's name, if any.
        world_size: the number of ranks that the caller starts by itself. By default they are torchrun's or srun's
            where one of these started this process, which is then told so; else as many as the config asks for.

    Returns:
        What `run_spec` runs.

    Raises:
        Refused: in one sentence, for what a user can cause.
    """
    folder = run_dir
    try:
        with refusing():
            typed, settings = convert_config(config)
            folder = run_dir or Path(typed.run.root, typed.run.name).absolute()
            return _prepare(typed, settings, folder, list(overrides), sweep, world_size)
    except Refused:
        if folder is not None:
            _remove_if_empty(folder)
        raise


def convert_config(config: DictConfig | Config) -> tuple[Config, dict[str, Any]]:
    """A config as typed objects and as plain values, with the model as its folder's weights have it.

    Raises:
        ConfigError: a field is missing or unknown, or the model's folder cannot be used.
    """
    if isinstance(config, Config):
        typed, settings = config, to_dict(OmegaConf.structured(config))
    else:
        typed, settings = to_config(config), to_dict(config)
    if typed.model.load_weights and typed.model.hf_assets_path is not None:
        folder = Path(typed.model.hf_assets_path).expanduser()
        with naming_fields(("model.path", folder)):
            model = as_stored(folder, typed.model)
        if model is not typed.model:
            typed = dataclasses.replace(typed, model=model)
            settings = {**settings, "model": to_dict(OmegaConf.structured(typed))["model"]}
    return typed, settings


def _prepare(
    config: Config,
    settings: dict[str, Any],
    run_dir: Path,
    overrides: list[str],
    sweep: str | None,
    world_size: int | None,
) -> RankSpec:
    check_config(config)
    seeding = config.checkpoint.create_seed_checkpoint
    if seeding:
        check_seed(os.environ)
        # One process writes it, whatever will train from it.
        launch = dataclasses.replace(config.launch, device=Device.cpu)
        config = dataclasses.replace(config, parallel=ParallelConfig(), launch=launch)
    ranks = None if seeding or world_size is not None else detect_ranks(os.environ, _degrees(config))
    device_type = pick_device_type(config.launch.device.value)
    config = _decide_compilation(config, device_type)
    layout = _resolve_layout(config, device_type, ranks.world_size if ranks is not None else world_size)
    threads = threads_per_rank(
        config.launch.threads_per_rank, os.environ, local_ranks=1 if ranks is None else ranks.local_world_size
    )
    config = dataclasses.replace(config, launch=dataclasses.replace(config.launch, threads_per_rank=threads))
    if world_size is None:
        _tell_torch(ranks)
    with naming_fields(("run.root", run_dir)):
        check_disk(config, run_dir)
    data = prepare_data(config, fresh=not (run_dir / RECORD).exists())
    return RankSpec(
        config=config,
        config_dict=settings,
        config_hash=config_hash(settings, later_defaults(config)),
        layout=layout,
        device_type=device_type,
        run_dir=run_dir,
        data_folders=data.training,
        validation_folders=data.validation,
        sweep=sweep,
        overrides=overrides,
        given_ranks=ranks is not None,
    )


def _decide_compilation(config: Config, device_type: str) -> Config:
    """The config with `true` or `false` in place of `train.compile=auto`."""
    compiled = compiles(config.train, config.parallel, config.precision.name, device_type, can_compile=can_compile())
    # What is neither is refused with the layout.
    known = isinstance(config.train.compile, bool) or config.train.compile == "auto"
    return dataclasses.replace(config, train=dataclasses.replace(config.train, compile=compiled)) if known else config


def _resolve_layout(config: Config, device_type: str, given: int | None) -> Layout:
    """The degrees, for ranks that were started for us (`given`) or that we start on the devices here."""
    available = given if given is not None else torch.cuda.device_count() if device_type == "cuda" else 1
    layout = resolve_layout(config.parallel, available, ranks_are_given=given is not None)
    check_parallel(config, layout, device_type)
    check_launch(layout, device_type, ranks_are_given=given is not None)
    return layout


def _tell_torch(ranks: Ranks | None) -> None:
    if ranks is not None:
        export_ranks(ranks)
    else:
        forget_ranks()


def _degrees(config: Config) -> int | None:
    p = config.parallel
    return None if p.dp_shard < 1 else p.dp_replicate * p.dp_shard * p.tp * p.pp * p.cp


def _remove_if_empty(run_dir: Path) -> None:
    """Hydra, or the check of the disk, has made the folder; a refused command leaves none behind."""
    try:
        run_dir.rmdir()
    except OSError:
        return
