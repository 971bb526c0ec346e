"""This machine's limits, clock and tools."""

import ctypes
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from regrow.launch.doctor.verdict import State, Verdict

__all__ = ["check_clock", "check_git", "check_locked_memory", "check_open_files", "check_shared_memory"]

_FEWEST_FILES, _FEW_FILES = 256, 1024
_TIME_ERROR = 5
_SMALLEST_SHM, _SMALL_SHM = 16 << 20, 512 << 20


def check_open_files() -> Verdict:
    """A rank has its data, logs, checkpoint files and connections to other ranks open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{_count(soft)} at once (at most {_count(hard)})"
    state = State.ok
    if 0 <= soft < _FEW_FILES:
        state = State.broken if soft < _FEWEST_FILES else State.warning
    remedy = "" if state is State.ok else "raise it: ulimit -n 65536, or LimitNOFILE of the service that starts runs"
    return Verdict(name="open files", state=state, found=found, remedy=remedy)


def _count(limit: int) -> str:
    return "without limit" if limit == resource.RLIM_INFINITY else str(limit)


def check_locked_memory(infiniband: Path = Path("/sys/class/infiniband")) -> Verdict:
    """InfiniBand and RoCE move what is locked in memory.

    Args:
        infiniband: where the kernel lists such adapters.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = soft == resource.RLIM_INFINITY
    found = "without limit" if unlimited else f"{soft / 2**10:,.0f} KiB"
    adapters = sorted(p.name for p in infiniband.iterdir()) if infiniband.is_dir() else []
    if adapters and not unlimited:
        return Verdict(
            name="locked memory",
            state=State.broken,
            found=f"{found}, and NCCL needs more for {', '.join(adapters)}",
            remedy="raise it: ulimit -l unlimited, and under Slurm PropagateResourceLimitsExcept=MEMLOCK",
        )
    return Verdict(name="locked memory", state=State.ok, found=found)


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Verdict:
    """Ranks of one machine exchange through it.

    Args:
        folder: where it is mounted.
    """
    remedy = f"give it more: mount -o remount,size=8G {folder}, or docker run --shm-size=8g"
    if not os.access(folder, os.W_OK):
        return Verdict(name="shared memory", state=State.broken, found=f"{folder} cannot be written", remedy=remedy)
    usage = shutil.disk_usage(folder)
    found = f"{folder} has {usage.free / 2**20:,.0f} of {usage.total / 2**20:,.0f} MiB free"
    if usage.free < _SMALL_SHM:
        state = State.broken if usage.free < _SMALLEST_SHM else State.warning
        return Verdict(name="shared memory", state=state, found=found, remedy=remedy)
    return Verdict(name="shared memory", state=State.ok, found=found)


def check_git(folder: Path) -> Verdict:
    """Runs write down which revision they were made with.

    Args:
        folder: where commands are given.
    """
    if shutil.which("git") is None:
        return Verdict(
            name="git", state=State.warning, found="not installed, so that runs do not say which revision made them",
            remedy="install git",
        )  # fmt: skip
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    found = f"revision {done.stdout.strip()}" if done.returncode == 0 else f"{folder} is no repository"
    return Verdict(name="git", state=State.ok, found=found)


def check_clock(environ: Mapping[str, str]) -> Verdict:
    """Whether clocks agree: between a job's nodes where there is a job, else what the kernel says of this one's.

    Args:
        environ: the environment.
    """
    nodes = environ.get("SLURM_NNODES", "1")
    if "SLURM_JOB_ID" in environ and nodes.isdigit() and int(nodes) > 1:
        return _between_nodes(int(nodes))
    # The kernel's own state of the clock: the structure is larger than any version's.
    if ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512)) == _TIME_ERROR:
        return Verdict(
            name="clock",
            state=State.warning,
            found="not synchronised with others, as the kernel says",
            remedy="run chrony or systemd-timesyncd, so that logs of several nodes can be read together",
        )
    return Verdict(name="clock", state=State.ok, found="synchronised, as the kernel says")


def _between_nodes(nodes: int) -> Verdict:
    command = ["srun", "--overlap", f"--nodes={nodes}", "--ntasks-per-node=1", "date", "+%s.%N"]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    took = time.monotonic() - began
    times = [float(line) for line in done.stdout.split()]
    # They were read within `took`, so that what is beyond it is the clocks'.
    apart = max(0.0, max(times) - min(times) - took)
    found = f"those of {len(times)} nodes are at least {apart:.1f} s apart" if apart else f"{len(times)} nodes agree"
    if apart > 1.0:
        return Verdict(
            name="clock", state=State.warning, found=found, remedy="run chrony on all nodes, from one source"
        )
    return Verdict(name="clock", state=State.ok, found=found)
