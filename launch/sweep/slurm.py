"""`hydra/launcher=slurm`: a sweep as arrays of jobs, one array per shape of resources."""

import logging
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, final

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from regrow.launch.config.errors import UserError
from regrow.launch.sweep.launcher_config import SlurmConfig
from regrow.launch.sweep.plan import compose_runs_once, plan_runs
from regrow.launch.sweep.slurm_jobs import (
    ClusterError,
    Job,
    Partition,
    list_jobs,
    read_partition,
    require_slurm,
    submit,
)
from regrow.launch.sweep.slurm_script import Script, ScriptRun, Shape, write_script
from regrow.launch.sweep.status import Sweep, SweepRun, inspect_run, open_sweep
from regrow.launch.sweep.wait import wait_for_runs

__all__ = ["SlurmLauncher", "shape_of", "submit_runs"]

log = logging.getLogger(__name__)
FOLDER = "slurm"
_QUEUED = (
    "PENDING",
    "RUNNING",
    "CONFIGURING",
    "COMPLETING",
    "REQUEUED",
    "SUSPENDED",
    "STOPPED",
    "RESIZING",
    "SIGNALING",
)


@final
class SlurmLauncher(Launcher):
    """See `SlurmConfig`, whose fields are the arguments."""

    def __init__(self, **fields: Any) -> None:
        self._config: DictConfig | None = None
        self._context: HydraContext | None = None
        self._settings = slurm_config(fields)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._context, self._config = hydra_context, config
        compose_runs_once(hydra_context)

    def _partition_if_there(self) -> Partition | None:
        """The cluster's partition, for a script that is only shown: there need not be a cluster here."""
        if shutil.which("scontrol") is None:
            return None
        try:
            return read_partition(self._settings.partition)
        except ClusterError as error:
            log.info("the script is made without the cluster's limits: %s", error)
            return None

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        assert self._config is not None
        assert self._context is not None
        runs = plan_runs(self._context, self._config, job_overrides, initial_job_idx, "slurm")
        folder = Path(str(self._config.hydra.sweep.dir)).absolute()
        if self._settings.dry_run:
            Sweep.load(folder)
            for _, script in scripts(folder, runs, self._partition_if_there()):
                print(script)
            return [_returned(list(o)) for o in job_overrides]
        submit_runs(folder, runs)
        if not self._settings.wait:
            return [_returned(list(o)) for o in job_overrides]
        values = wait_for_runs(folder, [r.name for r in runs], self._settings.poll_s)
        return [_returned(list(o), v) for o, v in zip(job_overrides, values, strict=True)]


def _returned(overrides: list[str], value: Any = None) -> JobReturn:
    returned = JobReturn(overrides=overrides)
    returned.return_value = value
    returned.status = JobStatus.FAILED if isinstance(value, BaseException) else JobStatus.COMPLETED
    return returned


def slurm_config(fields: Mapping[str, Any]) -> SlurmConfig:
    """Typed fields, checked.

    Raises:
        UserError: naming field, rule, value and remedy.
    """
    plain: dict[str, Any] = {k: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for k, v in fields.items()}
    config = SlurmConfig(**plain)
    for name, low in (("nodes", 1), ("tasks_per_node", 1), ("gpus_per_node", 0), ("cpus_per_task", 1),
                      ("array_parallelism", 0), ("grace_s", 10), ("max_requeues", 0), ("max_stuck", 1)):  # fmt: skip
        value = getattr(config, name)
        if value is not None and value < low:
            raise UserError(f"hydra.launcher.{name} must be at least {low}, but is {value}; use {max(low, 1)}")
    if config.poll_s <= 0:
        raise UserError(f"hydra.launcher.poll_s must be above 0, but is {config.poll_s:g}; use 10")
    return config


def shape_of(run: SweepRun, config: SlurmConfig, partition: Partition | None) -> Shape:
    """The resources that a run needs, computed from its degrees.

    Args:
        run: planned.
        config: the launcher's fields.
        partition: where it would go; None where that is not known.

    Raises:
        UserError: ranks, nodes, tasks and GPUs do not fit together or the partition's nodes.
    """
    most, fewest = run.ranks[0], run.ranks[-1]
    available = partition.gpus if partition and run.gpu else 0
    tasks = config.tasks_per_node
    if tasks is None and config.nodes is not None and len(run.ranks) == 1:
        tasks = most // config.nodes if most % config.nodes == 0 else None
    if tasks is None:
        tasks = min(fewest, config.gpus_per_node or available or fewest)
    for ranks in run.ranks:
        if ranks % tasks or (config.nodes is not None and ranks == most and ranks // tasks != config.nodes):
            shown = f"{config.nodes} × {tasks}" if config.nodes is not None else f"a multiple of {tasks}"
            raise UserError(
                f"the number of ranks must be hydra.launcher.nodes × tasks_per_node ({shown}), but the product of "
                f"the degrees is {ranks}; change parallel.* or leave nodes and tasks_per_node out"
            )
    gpus = config.gpus_per_node if config.gpus_per_node is not None else (tasks if available else 0)
    if partition is not None and gpus > partition.gpus:
        raise UserError(
            f"hydra.launcher.gpus_per_node must be at most what a node of partition {partition.name} has "
            f"({partition.gpus}), but is {gpus}; use {partition.gpus} and more nodes"
        )
    if 0 < gpus < tasks and run.gpu:
        raise UserError(
            f"hydra.launcher.gpus_per_node must be at least tasks_per_node ({tasks}), one GPU per rank, but is "
            f"{gpus}; use {tasks}, or launch.device=cpu"
        )
    needed = tasks * (config.cpus_per_task or 1)
    if partition is not None and partition.cpus and needed > partition.cpus:
        raise UserError(
            f"hydra.launcher.tasks_per_node × cpus_per_task must be at most the CPUs of a node of partition "
            f"{partition.name} ({partition.cpus}), but is {needed}; use more nodes"
        )
    return Shape(ranks=tuple(run.ranks), tasks_per_node=tasks, gpus_per_node=gpus)


def scripts(folder: Path, runs: Sequence[SweepRun], partition: Partition | None) -> list[tuple[list[SweepRun], str]]:
    """A script for each shape, with the runs in it."""
    groups: dict[tuple[Shape, str, frozenset[tuple[str, str]]], list[SweepRun]] = {}
    for run in runs:
        config = slurm_config(run.resources)
        key = (shape_of(run, config, partition), run.working_dir, frozenset(run.environment().items()))
        groups.setdefault(key, []).append(run)
    most = partition.max_array if partition else len(runs)
    written = []
    for (shape, working_dir, _), members in groups.items():
        for start in range(0, len(members), most):
            part = members[start : start + most]
            written.append((part, write_script(_script(folder, shape, part, working_dir, partition))))
    return written


def _script(
    folder: Path, shape: Shape, runs: Sequence[SweepRun], working_dir: str, partition: Partition | None
) -> Script:
    config = slurm_config(runs[0].resources)
    grace = min(config.grace_s, partition.grace_s) if partition else config.grace_s
    mounted = [p for p in (working_dir, str(folder), runs[0].packages_folder) if p]
    command, srun = _command(config, mounted, working_dir)
    return Script(
        sweep=folder.name,
        folder=str(folder / FOLDER),
        working_dir=working_dir,
        shape=shape,
        runs=[ScriptRun(run_dir=r.run_dir, arguments=r.arguments) for r in runs],
        options=list(_options(config)),
        env={**runs[0].environment(), **config.env},
        setup=config.setup,
        command=command,
        srun=[*srun, *config.extra_srun],
        grace_s=config.grace_s,
        save_s=grace,
        max_requeues=config.max_requeues,
        max_stuck=config.max_stuck,
        array_parallelism=config.array_parallelism,
    )


def _options(config: SlurmConfig) -> Iterable[str]:
    yield f"--job-name={config.job_name}"
    for name in ("partition", "account", "qos", "constraint", "time", "mem", "cpus_per_task"):
        value = getattr(config, name)
        if value is not None:
            yield f"--{name.replace('_', '-')}={value}"
    yield from config.extra


def _command(config: SlurmConfig, mounted: Sequence[str], working_dir: str) -> tuple[list[str], list[str]]:
    """What starts a rank, and srun's options for it."""
    if config.command is not None:
        start = shlex.split(config.command)
    elif config.container is not None:
        start = ["regrow"]
    else:
        installed = Path(sys.executable).with_name("regrow")
        start = [str(installed)] if installed.exists() else [sys.executable, "-P", "-m", "regrow.launch.train"]
    if config.container is None:
        return start, []
    places = dict.fromkeys(mounted)
    if config.container.endswith(".sif"):
        binds = [o for place in places for o in ("--bind", place)]
        return ["apptainer", "exec", "--nv", *binds, config.container, *start], []
    mounts = ",".join(f"{place}:{place}" for place in places)
    return start, [
        f"--container-image={config.container}", f"--container-mounts={mounts}", f"--container-workdir={working_dir}"
    ]  # fmt: skip


def submit_runs(folder: Path, runs: Sequence[SweepRun]) -> list[str]:
    """Submits those that are neither finished nor queued; returns their names.

    Raises:
        UserError: something does not fit; then nothing is submitted.
    """
    require_slurm()
    # Another program's directory is refused before anything else is looked at.
    Sweep.load(folder)
    partitions = {p: read_partition(p) for p in {slurm_config(r.resources).partition for r in runs}}
    submitted = []
    with open_sweep(folder) as sweep:
        queue = list_jobs()
        todo = []
        for run in (sweep.add(r) for r in runs):
            reason = _reason_to_leave(run, queue)
            if reason is None:
                todo.append(run)
            else:
                log.info("%s: %s", run.name, reason)
        (folder / FOLDER).mkdir(exist_ok=True)
        planned = []
        for partition in partitions:
            own = [r for r in todo if slurm_config(r.resources).partition == partition]
            planned += scripts(folder, own, partitions[partition]) if own else []
        for members, text in planned:
            config = slurm_config(members[0].resources)
            path = _new_path(folder / FOLDER, str(shape_of(members[0], config, partitions[config.partition])))
            path.write_text(text)
            path.chmod(0o755)
            array = submit(str(path))
            for index, run in enumerate(members):
                run.jobs.append(f"{array}_{index}")
                submitted.append(run.name)
                log.info("%s: job %s_%d", run.name, array, index)
            # What is submitted is known even if the next array is refused.
            sweep.save()
    log.info("%d of %d runs submitted; regrow-sweep status %s", len(submitted), len(runs), folder)
    return submitted


def _reason_to_leave(run: SweepRun, queue: Mapping[str, Job]) -> str | None:
    job = next((queue[i] for i in reversed(run.jobs) if i in queue), None)
    if job is not None and job.state in _QUEUED and job.state != "COMPLETING":
        return f"left alone, job {job.id} is {job.state.lower()}"
    status = inspect_run(run, queue)
    if status.state == "finished":
        return f"finished already at step {status.step}"
    return None


def _new_path(folder: Path, stem: str) -> Path:
    number = 1
    while (path := folder / f"{stem}-{number}.sh").exists():
        number += 1
    return path
