"""Ranks that the environment holds already: torchrun's or srun's. Pure but for `export_ranks` and `forget_ranks`."""

import logging
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from regrow.errors import ConfigError

__all__ = ["RANK_VARIABLES", "Ranks", "detect_ranks", "export_ranks", "forget_ranks"]

log = logging.getLogger(__name__)

# torchrun's; torch.distributed and the ranks read them.
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """This process among those that were started together."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master: str
    port: int


def detect_ranks(environ: Mapping[str, str], degrees: int | None) -> Ranks | None:
    """This process' rank, None where it was started alone.

    A variable that is empty is as good as missing, and torchrun's count only together. Slurm's count only where the
    number of tasks is the product of the degrees: a shell inside an allocation has them too.

    Args:
        environ: the environment.
        degrees: the product, None while `dp_shard` is -1.

    Raises:
        ConfigError: the variables contradict each other.
    """
    given = {name: value for name, value in environ.items() if value.strip()}
    if "RANK" in given and "WORLD_SIZE" in given:
        return _from_torchrun(given)
    # Set inside srun alone; SLURM_NTASKS is there in a batch script and in a shell of salloc too.
    tasks = _number(given, "SLURM_STEP_NUM_TASKS", 1, low=1)
    if "SLURM_PROCID" not in given or tasks < 2 or (degrees is not None and degrees != tasks):
        return None
    nodes = _number(given, "SLURM_STEP_NUM_NODES", _number(given, "SLURM_NNODES", 1, low=1), low=1)
    return Ranks(
        rank=_number(given, "SLURM_PROCID", 0, below=("SLURM_STEP_NUM_TASKS", tasks)),
        world_size=tasks,
        local_rank=_number(given, "SLURM_LOCALID", 0),
        # A step may have fewer nodes than its job.
        local_world_size=max(1, tasks // nodes),
        master=given.get("MASTER_ADDR", ""),
        port=_number(given, "MASTER_PORT", _port(given), below=("the number of ports", 65536)),
    )


def _from_torchrun(given: Mapping[str, str]) -> Ranks:
    world = _number(given, "WORLD_SIZE", 1, low=1)
    rank = _number(given, "RANK", 0, below=("WORLD_SIZE", world))
    local_world = _number(given, "LOCAL_WORLD_SIZE", world, low=1)
    if local_world > world:
        raise ConfigError(f"LOCAL_WORLD_SIZE must be at most WORLD_SIZE ({world}), but is {local_world}; {_REMEDY}")
    return Ranks(
        rank=rank,
        world_size=world,
        local_rank=_number(given, "LOCAL_RANK", rank % local_world, below=("LOCAL_WORLD_SIZE", local_world)),
        local_world_size=local_world,
        master=given.get("MASTER_ADDR", "127.0.0.1"),
        port=_number(given, "MASTER_PORT", 29500, below=("the number of ports", 65536)),
    )


_REMEDY = "set it as torchrun does, or unset RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE to start ranks here"


def _number(
    given: Mapping[str, str], name: str, default: int, *, low: int = 0, below: tuple[str, int] | None = None
) -> int:
    """A variable's value within its bounds."""
    text = given.get(name, str(default)).strip()
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < low:
        raise ConfigError(f"{name} must be a whole number of at least {low}, but is {text!r}; {_REMEDY}")
    if below is not None and int(text) >= below[1]:
        raise ConfigError(f"{name} must be below {below[0]} ({below[1]}), but is {text}; {_REMEDY}")
    return int(text)


def _port(environ: Mapping[str, str]) -> int:
    """Below the ports that systems give out by themselves. Every job uses two; neighbours in an array share nodes,
    and a requeued job may overlap with what is left of its predecessor.
    """
    job, restart = _number(environ, "SLURM_JOB_ID", 0), _number(environ, "SLURM_RESTART_COUNT", 0)
    return 20000 + 2 * ((job + 101 * restart) % 6000)


def forget_ranks() -> None:
    """Removes what another launch left in this process' environment, where it was started alone."""
    names = (*RANK_VARIABLES, "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    left = {name: os.environ.pop(name) for name in names if name in os.environ}
    told = [f"{name}={value}" for name, value in left.items() if value]
    if told:
        log.warning(
            "%s: left over from another launch, and ignored; this process starts its own ranks", " ".join(told)
        )


def export_ranks(ranks: Ranks) -> None:
    """Sets torchrun's variables, which torch.distributed reads."""
    master = ranks.master or _first_host(os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_JOB_NODELIST"])
    os.environ |= {
        "RANK": str(ranks.rank),
        "WORLD_SIZE": str(ranks.world_size),
        "LOCAL_RANK": str(ranks.local_rank),
        "LOCAL_WORLD_SIZE": str(ranks.local_world_size),
        "MASTER_ADDR": master,
        "MASTER_PORT": str(ranks.port),
    }


def _first_host(nodes: str) -> str:
    listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return listed.stdout.split()[0]
