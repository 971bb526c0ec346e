"""Ranks that the environment holds already: torchrun's or srun's. Pure but for `export`."""

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Ranks", "detect_ranks", "export_ranks"]


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

    Slurm's variables count only where the number of tasks is the product of the degrees: a shell inside an
    allocation has them too.

    Args:
        environ: the environment.
        degrees: the product, None while `dp_shard` is -1.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return Ranks(
            rank=int(environ["RANK"]),
            world_size=int(environ["WORLD_SIZE"]),
            local_rank=int(environ.get("LOCAL_RANK", environ["RANK"])),
            local_world_size=int(environ.get("LOCAL_WORLD_SIZE", environ["WORLD_SIZE"])),
            master=environ.get("MASTER_ADDR", "127.0.0.1"),
            port=int(environ.get("MASTER_PORT", "29500")),
        )
    # Set inside srun alone; SLURM_NTASKS is there in a batch script and in a shell of salloc too.
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if "SLURM_PROCID" not in environ or tasks < 2 or (degrees is not None and degrees != tasks):
        return None
    return Ranks(
        rank=int(environ["SLURM_PROCID"]),
        world_size=tasks,
        local_rank=int(environ["SLURM_LOCALID"]),
        # A step may have fewer nodes than its job.
        local_world_size=max(1, tasks // int(environ.get("SLURM_STEP_NUM_NODES", environ.get("SLURM_NNODES", "1")))),
        master=environ.get("MASTER_ADDR", ""),
        port=int(environ.get("MASTER_PORT", _port(environ))),
    )


def _port(environ: Mapping[str, str]) -> int:
    """Below the ports that systems give out by themselves. Every job uses two; neighbours in an array share nodes,
    and a requeued job may overlap with what is left of its predecessor.
    """
    job, restart = int(environ.get("SLURM_JOB_ID", "0")), int(environ.get("SLURM_RESTART_COUNT", "0"))
    return 20000 + 2 * ((job + 101 * restart) % 6000)


def export_ranks(ranks: Ranks) -> None:
    """Sets torchrun's variables, which torch.distributed reads."""
    master = ranks.master or _first_host(os.environ.get("SLURM_STEP_NODELIST", os.environ["SLURM_JOB_NODELIST"]))
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
