"""Slurm and Weights & Biases."""

import netrc
import shutil
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from regrow.launch.doctor.verdict import State, Verdict

__all__ = ["check_slurm", "check_wandb"]

_COMMANDS = ("sinfo", "squeue", "sbatch", "srun", "scontrol", "sacct")


def check_slurm(*, wanted: bool) -> Verdict:
    """Whether its commands are there and its controller answers.

    Args:
        wanted: the command uses it; elsewhere a Slurm that does not work is a warning.
    """
    there = [name for name in _COMMANDS if shutil.which(name) is not None]
    bad = State.broken if wanted else State.warning
    if not there:
        remedy = "give the command where Slurm is, or leave out hydra/launcher=slurm" if wanted else ""
        return Verdict(
            name="Slurm", state=State.broken if wanted else State.absent, found="not installed", remedy=remedy
        )
    missing = [name for name in _COMMANDS if name not in there]
    if missing:
        return Verdict(
            name="Slurm", state=bad, found=f"{', '.join(missing)} cannot be found", remedy="add them to PATH"
        )
    try:
        done = subprocess.run(
            ["sinfo", "--noheader", "--format=%P %a %D"], capture_output=True, text=True, timeout=10, check=False
        )
        problem = (done.stderr.strip() or f"exit code {done.returncode}") if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        return _no_answer(bad, str(error))
    if problem:
        return _no_answer(bad, problem.splitlines()[-1])
    rows = [line.split() for line in done.stdout.splitlines() if len(line.split()) == 3]
    if not any(state == "up" for _, state, _ in rows):
        return Verdict(name="Slurm", state=bad, found="no partition is up", remedy="ask its administrator; see sinfo")
    told = ", ".join(f"{name} ({nodes} nodes, {state})" for name, state, nodes in rows)
    return Verdict(name="Slurm", state=State.ok, found=f"partitions {told}")


def _no_answer(state: State, problem: str) -> Verdict:
    return Verdict(
        name="Slurm",
        state=state,
        found=f"sinfo does not work: {problem}",
        remedy="see whether slurmctld runs and SLURM_CONF is right; scontrol ping",
    )


def check_wandb(environ: Mapping[str, str], mode: str | None) -> Verdict:
    """Whether Weights & Biases would take what is sent.

    Args:
        environ: the environment.
        mode: `wandb.mode`; None where no logger is W&B.
    """
    try:
        found = f"wandb {version('wandb')}"
    except PackageNotFoundError:
        state = State.absent if mode is None else State.broken
        return Verdict(name="W&B", state=state, found="not installed", remedy="pip install wandb" if mode else "")
    host = environ.get("WANDB_BASE_URL", "https://api.wandb.ai").partition("://")[2].split("/")[0]
    if environ.get("WANDB_API_KEY") or _has_entry(environ, host):
        return Verdict(name="W&B", state=State.ok, found=f"{found}, with a key for {host}")
    found = f"{found}, not logged in at {host}"
    if mode == "online":
        return Verdict(
            name="W&B", state=State.broken, found=f"{found}, but wandb.mode is online",
            remedy="wandb login, or set WANDB_API_KEY, or wandb.mode=offline",
        )  # fmt: skip
    if mode == "offline":
        return Verdict(
            name="W&B", state=State.warning, found=f"{found}; runs are written here alone",
            remedy="wandb login before wandb sync sends them",
        )  # fmt: skip
    return Verdict(name="W&B", state=State.ok, found=f"{found}; nothing is logged there")


def _has_entry(environ: Mapping[str, str], host: str) -> bool:
    path = Path(environ.get("NETRC", str(Path(environ.get("HOME", "~")).expanduser() / ".netrc")))
    try:
        return netrc.netrc(str(path)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
