"""What a rank knows of the others: process groups, meshes, its device."""

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from regrow.torch_compat import clear_sharding_cache
from regrow.trainer.parallel.layout import Layout
from regrow.trainer.parallel.mesh import Meshes, make_meshes

__all__ = ["ParallelContext", "close_parallel", "open_parallel"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelContext:
    """What a rank needs to know of the others.

    Attributes:
        layout: the degrees.
        meshes: see `Meshes`.
        device: where this rank computes.
        cpu_group: gloo, over all ranks, apart from the training's traffic.
        rank: among all.
    """

    layout: Layout
    meshes: Meshes
    device: torch.device
    cpu_group: dist.ProcessGroup
    rank: int

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.layout.world_size

    @property
    def data_rank(self) -> int:
        """This rank among those that read different data."""
        return self.coordinate("dp_replicate") * self.layout.dp_shard + self.coordinate("dp_shard")

    @property
    def reads_first(self) -> bool:
        """Whether this rank stands for those that read the same data."""
        return self.coordinate("pp") == self.coordinate("cp") == self.coordinate("tp") == 0

    def coordinate(self, axis: str) -> int:
        """This rank's coordinate along an axis of the data mesh."""
        return self.meshes.data.get_local_rank(axis)

    def group_name(self, axis: str) -> str:
        """The name of this rank's group along an axis of the data mesh."""
        return str(self.meshes.data.get_group(axis).group_name)

    def stage_ranks(self, stage_rank: int) -> list[int]:
        """The ranks, among all, with a coordinate along the pp axis."""
        size = self.layout.world_size // self.layout.pp
        return list(range(stage_rank * size, (stage_rank + 1) * size))

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what is written once per run."""
        return self.rank == 0


def open_parallel(layout: Layout, device_type: str, timeout_s: float) -> ParallelContext:
    """Joins the process groups, with the rank from torchrun's variables, or alone where they are not set.

    Args:
        layout: the degrees.
        device_type: `cpu` (gloo) or `cuda` (nccl).
        timeout_s: after which a collective that hangs is an error.
    """
    rank = int(os.environ.get("RANK", "0"))
    # Under srun a task may see its own GPU alone, as number 0.
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = (
        torch.device("cuda", local_rank % torch.cuda.device_count()) if device_type == "cuda" else torch.device("cpu")
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(seconds=timeout_s)
    backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
    if layout.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
        # The elastic agent keeps its store over restarts; the addresses of dead ranks must not be found in it.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"attempt-{attempt}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    meshes = make_meshes(layout, device.type)
    cpu_group = dist.new_group(backend="gloo", timeout=timeout)
    return ParallelContext(layout=layout, meshes=meshes, device=device, cpu_group=cpu_group, rank=rank)


def close_parallel() -> None:
    """Leaves the process groups."""
    several = dist.is_initialized() and dist.get_world_size() > 1
    if dist.is_initialized():
        dist.destroy_process_group()
    if several:
        # The next run of this process would get groups that are gone.
        clear_sharding_cache()
