"""From Hydra's jobs to the runs of a sweep: their names, directories, commands and ranks. No torch."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict

from regrow.launch.config.errors import UserError, check_chdir
from regrow.launch.config.plugins import active_packages
from regrow.launch.config.schema import Config, Device
from regrow.launch.config.typed import to_config
from regrow.launch.sweep.status import SweepRun, run_name_override

__all__ = ["compose_runs_once", "kept_hydra_overrides", "plan_runs", "ranks_of"]

# What says where a sweep runs, and what the run's own command must not repeat.
_DROPPED = (
    "hydra/launcher",
    "hydra.launcher",
    "hydra/sweeper",
    "hydra.sweeper",
    "hydra.sweep",
    "hydra.run",
    "hydra.mode",
)
# Configs that are kept between the two times that Hydra asks for them; one takes about half a megabyte.
_KEPT = 64


def compose_runs_once(context: HydraContext) -> None:
    """Lets Hydra's sweeper, which composes each run to see whether that can be done, do so in place of `plan_runs`.

    Args:
        context: Hydra's, shared by its sweeper and the launcher.
    """
    loader = context.config_loader
    compose = loader.load_sweep_config
    kept: dict[tuple[str, ...], DictConfig] = {}

    def load(master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        key = tuple(sweep_overrides)
        if key in kept:
            return kept.pop(key)
        composed = compose(master_config, sweep_overrides)
        if len(kept) < _KEPT:
            kept[key] = composed
        return composed

    vars(loader)["load_sweep_config"] = load


def plan_runs(
    context: HydraContext, config: DictConfig, job_overrides: Sequence[Sequence[str]], first: int, launcher: str
) -> list[SweepRun]:
    """One run per job, each checked as far as that needs neither files nor devices.

    Args:
        context: Hydra's.
        config: the sweep's own config, `hydra` included.
        job_overrides: of each job.
        first: the number of the first job.
        launcher: `slurm` or `local`.

    Raises:
        UserError: a field is wrong, or two runs would share a directory.
    """
    resources = OmegaConf.to_container(config.hydra.launcher, resolve=True)
    assert isinstance(resources, dict)
    kept = kept_hydra_overrides(list(config.hydra.overrides.hydra))
    flags = [f"--config-dir={s.path}" for s in config.hydra.runtime.config_sources if s.provider == "command-line"]
    before, packages = HydraConfig.instance().cfg, active_packages()
    runs: list[SweepRun] = []
    try:
        for index, overrides in enumerate(job_overrides):
            composed = context.config_loader.load_sweep_config(config, list(overrides))
            with open_dict(composed):
                composed.hydra.job.id = str(first + index)
                composed.hydra.job.num = first + index
            HydraConfig.instance().set_config(composed)
            check_chdir(chdir=composed.hydra.job.chdir)
            run_dir = Path(str(composed.hydra.sweep.dir), str(composed.hydra.sweep.subdir)).absolute()
            task = copy.deepcopy(composed)
            with open_dict(task):
                del task["hydra"]
            typed = to_config(task)
            own = [o for o in overrides if _key(o) != "run.name"]
            runs.append(
                SweepRun(
                    name=typed.run.name,
                    run_dir=str(run_dir),
                    arguments=[
                        *flags,
                        *own,
                        *kept,
                        run_name_override(typed.run.name),
                        f"hydra.run.dir={_quoted(run_dir)}",
                    ],
                    steps=typed.train.steps,
                    checkpoint_folder=typed.checkpoint.folder,
                    ranks=ranks_of(typed, resources),
                    gpu=typed.launch.device is not Device.cpu,
                    cpus=max(1, typed.launch.threads_per_rank),
                    launcher=launcher,
                    resources={str(k): v for k, v in resources.items()},
                    working_dir=str(Path.cwd()),
                    packages=list(packages.names),
                    packages_folder=packages.folder,
                )
            )
    finally:
        HydraConfig.instance().cfg = before
    _check_apart(runs)
    return runs


def kept_hydra_overrides(overrides: Sequence[str]) -> list[str]:
    """Those that concern a run itself (`hydra.verbose=true`), not the sweep."""
    return [o for o in overrides if not _key(o).startswith(_DROPPED)]


def _key(override: str) -> str:
    return OverridesParser.create().parse_override(override).key_or_group


def _quoted(path: Path) -> str:
    escaped = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _check_apart(runs: Sequence[SweepRun]) -> None:
    seen: dict[str, SweepRun] = {}
    for run in runs:
        other = seen.setdefault(run.run_dir, run)
        if other is not run:
            raise UserError(
                f"the runs of a sweep must have directories of their own, but two share {run.run_dir}; sweep over "
                "fields that make a run another one, or set run.name"
            )


def ranks_of(config: Config, resources: dict[Any, Any]) -> list[int]:
    """How many ranks a run may have, the largest number first.

    Raises:
        UserError: `dp_shard=-1` and nothing says how many, or an elastic number does not fit the other degrees.
    """
    parallel, elastic = config.parallel, sorted(set(config.launch.elastic), reverse=True)
    others = parallel.dp_replicate * parallel.tp * parallel.pp * parallel.cp
    if parallel.dp_shard > 0:
        if elastic:
            raise UserError(
                f"parallel.dp_shard must be -1 with launch.elastic, but is {parallel.dp_shard}; use "
                "parallel.dp_shard=-1"
            )
        return [others * parallel.dp_shard]
    for ranks in elastic:
        if ranks < 1 or ranks % others:
            raise UserError(
                f"launch.elastic must hold multiples of the other degrees' product ({others}), but holds {ranks}; "
                f"use {others * max(1, ranks // others)}"
            )
    if elastic:
        return elastic
    nodes, tasks = resources.get("nodes"), resources.get("tasks_per_node") or resources.get("gpus_per_node")
    if tasks is None and resources.get("_target_", "").endswith("SlurmLauncher"):
        raise UserError(
            "hydra.launcher.tasks_per_node must be set where parallel.dp_shard is -1, but is null; use the number of "
            "GPUs of a node"
        )
    ranks = (nodes or 1) * (tasks or 1)
    if ranks % others:
        raise UserError(
            f"the number of ranks (hydra.launcher.nodes × tasks_per_node = {ranks}) must be a multiple of the "
            f"degrees' product ({others}), but is not; use {others * max(1, ranks // others)}"
        )
    return [ranks]
