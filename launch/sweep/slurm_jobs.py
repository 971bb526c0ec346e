"""Slurm's commands, and their answers as values."""

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from regrow.launch.config.errors import UserError

__all__ = [
    "ClusterError",
    "Job",
    "Partition",
    "cancel",
    "grace_seconds",
    "list_jobs",
    "read_partition",
    "require_slurm",
    "submit",
]

_TIMEOUT_S = 60.0
# Array tasks' numbers must stay below this where the cluster does not say otherwise.
MAX_ARRAY = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A row of the queue.

    Attributes:
        id: of the array's task (`12_3`).
        state: Slurm's word, in capitals.
        reason: why it waits.
        nodes: where it runs.
    """

    id: str
    state: str
    reason: str
    nodes: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Partition:
    """What submitting needs to know of a partition.

    Attributes:
        name: its name.
        gpus: on its best node.
        cpus: on its largest node.
        grace_s: between a preemption's warning and its kill.
        max_array: tasks of one array, at most.
    """

    name: str
    gpus: int
    cpus: int
    grace_s: int
    max_array: int


def require_slurm() -> None:
    """Raises UserError where there is no Slurm."""
    if shutil.which("sbatch") is None:
        raise UserError(
            "hydra/launcher=slurm must find sbatch on the PATH, but there is none; run it on a login node of the "
            "cluster, or use hydra/launcher=local"
        )


class ClusterError(UserError):
    """A command of Slurm's failed."""


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode:
        message = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise ClusterError(f"{command[0]} failed: {message[-1] if message else done.returncode}")
    return done.stdout


def submit(script: str) -> str:
    """Hands a script file to sbatch; returns the array's id.

    Raises:
        UserError: Slurm refused it.
    """
    return _run(["sbatch", "--parsable", script]).strip().partition(";")[0]


def list_jobs() -> dict[str, Job]:
    """This user's jobs that wait, run or are ending, by id; a row per task of an array."""
    rows = _run(["squeue", "--me", "--noheader", "--array", "--format=%i|%T|%r|%N"]).splitlines()
    fields = [row.split("|") for row in rows if row.count("|") == 3]
    return {i: Job(id=i, state=state, reason=reason, nodes=nodes) for i, state, reason, nodes in fields}


def cancel(jobs: Sequence[str]) -> None:
    """Cancels jobs; running ones get TERM and the cluster's KillWait to save."""
    if jobs:
        _run(["scancel", *jobs])


def read_partition(name: str | None) -> Partition:
    """The partition that a job would go to.

    Args:
        name: None for the cluster's default.

    Raises:
        UserError: there is none of that name.
    """
    questions = (
        ["scontrol", "show", "partition", "--oneliner"],
        ["sinfo", "--noheader", "--format=%R|%c|%G"],
        ["scontrol", "show", "config"],
    )
    with ThreadPoolExecutor(len(questions)) as pool:
        shown, listed, configured = pool.map(_run, questions)
    partitions = dict(_records(shown))
    chosen = name or next((n for n, p in partitions.items() if p.get("Default") == "YES"), None)
    if chosen is None:
        raise UserError(
            f"hydra.launcher.partition must be set where the cluster has no default, but is null; use "
            f"{', '.join(partitions)}"
        )
    # sbatch takes a list of partitions too.
    for part in chosen.split(","):
        if part not in partitions:
            raise UserError(
                f"hydra.launcher.partition must be one of {', '.join(partitions)}, but is {part}; choose one of them"
            )
    rows = [row.split("|") for row in listed.splitlines() if row.count("|") == 2]
    nodes = [(cpus, gres) for name, cpus, gres in rows if name in chosen.split(",")]
    settings = dict(re.findall(r"^(\w+)\s*=\s*(\d+)", configured, re.MULTILINE))
    return Partition(
        name=chosen,
        gpus=max((_gpus(gres) for _, gres in nodes), default=0),
        cpus=max((int(cpus.rstrip("+") or 0) for cpus, _ in nodes), default=0),
        grace_s=grace_seconds(partitions[chosen.split(",")[0]], settings),
        max_array=int(settings.get("MaxArraySize", MAX_ARRAY + 1)) - 1,
    )


def grace_seconds(partition: Mapping[str, str], settings: Mapping[str, str]) -> int:
    """What a preempted job has before it is killed: the partition's grace, else the cluster's KillWait."""
    grace = int(partition.get("GraceTime", "0") or 0)
    return grace or int(settings.get("KillWait", "30"))


def _records(text: str) -> list[tuple[str, dict[str, str]]]:
    found = []
    for line in text.splitlines():
        values = dict(word.split("=", 1) for word in line.split() if "=" in word)
        if "PartitionName" in values:
            found.append((values["PartitionName"], values))
    return found


def _gpus(gres: str) -> int:
    """`gpu:a100:4(S:0-1),gpu:2` → 6."""
    found = re.findall(r"gpu(?::[^:,()]+)?:(\d+)", gres)
    return sum(int(n) for n in found)
