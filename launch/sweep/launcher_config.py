"""Schemas of the launchers of sweeps."""

from dataclasses import dataclass, field
from typing import ClassVar

__all__ = ["LocalConfig", "SlurmConfig"]


@dataclass(kw_only=True, slots=True)
class SlurmConfig:
    """`hydra/launcher=slurm`: one array of jobs per shape of resources, one srun task per rank.

    Attributes:
        _target_: the launcher's class.
        partition: Slurm's partition, as sbatch takes it; null leaves it to the cluster.
        account: whom Slurm charges; null leaves it to the cluster.
        qos: Slurm's quality of service; null leaves it to the cluster.
        constraint: features that nodes must have, as sbatch takes them; null for none.
        time: wall limit of one start of a run, as sbatch takes it (`4:00:00`); a run that reaches it is saved,
            requeued and goes on. null leaves it to the cluster.
        mem: memory per node (`64G`); null leaves it to the cluster.
        cpus_per_task: CPUs per rank; null leaves it to the cluster.
        nodes: nodes of a run; null computes them from the degrees.
        tasks_per_node: ranks on a node; null takes a rank per GPU, or all of them on one node.
        gpus_per_node: GPUs on a node; null takes one per rank where the partition has some.
        array_parallelism: runs at a time; 0 sets no limit.
        job_name: name of the jobs in the queue.
        env: variables set for the ranks.
        setup: lines of shell before the ranks start, for instance `module load cuda`.
        container: an image; null for none. `*.sif` is run by Apptainer, anything else by srun's `--container-image`
            (Pyxis).
        command: what starts a rank; null is this installation's `regrow`, or the container's.
        extra: further options of sbatch (`--exclude=n7`).
        extra_srun: further options of srun.
        grace_s: the warning before the wall limit, in seconds; a save must fit into it.
        max_requeues: starts after a crash, in all.
        max_stuck: starts in a row that reach no newer checkpoint, before the run gives up.
        wait: follow the jobs and return each run's result, as sweepers that optimise need it.
        poll_s: seconds between looks at the queue, with `wait`.
        dry_run: print the scripts, submit nothing.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("hydra/launcher", "slurm_schema")

    _target_: str = "hydra_plugins.regrow.SlurmLauncher"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: str | None = None
    mem: str | None = None
    cpus_per_task: int | None = None
    nodes: int | None = None
    tasks_per_node: int | None = None
    gpus_per_node: int | None = None
    array_parallelism: int = 0
    job_name: str = "regrow"
    env: dict[str, str] = field(default_factory=dict)
    setup: list[str] = field(default_factory=list)
    container: str | None = None
    command: str | None = None
    extra: list[str] = field(default_factory=list)
    extra_srun: list[str] = field(default_factory=list)
    grace_s: int = 120
    max_requeues: int = 10
    max_stuck: int = 5
    wait: bool = False
    poll_s: float = 10.0
    dry_run: bool = False


@dataclass(kw_only=True, slots=True)
class LocalConfig:
    """`hydra/launcher=local`: several runs at once on this machine, each with its own ranks.

    Attributes:
        _target_: the launcher's class.
        n_jobs: runs at a time, at most.
        cpus: CPUs to share out, a run taking its ranks times `launch.threads_per_rank`; 0 is all of them.
        gpus: GPUs to share out, a run taking one per rank; -1 is all of them.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("hydra/launcher", "local_schema")

    _target_: str = "hydra_plugins.regrow.LocalLauncher"
    n_jobs: int = 2
    cpus: int = 0
    gpus: int = -1
