"""What a dry run needs of torch's that is private or of its tests: beside `torch_compat`, since no run loads it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.pipelining.schedules as pipeline_schedules
from torch._subclasses.fake_tensor import unset_fake_temporarily as without_fakes
from torch.utils._python_dispatch import TorchDispatchMode as DispatchMode
from torch.utils._pytree import tree_iter

from regrow.torch_compat import clear_sharding_cache

__all__ = ["DispatchMode", "device_of_fake", "imagined_ranks", "key_of_storage", "tree_iter", "without_fakes"]


def device_of_fake(func: Any, args: tuple[Any, ...]) -> torch.device | None:
    """The device of a fake tensor where that is all that is asked; None where it is not.

    Every look at a fake tensor's device passes a dispatch mode as an operator.
    """
    if func is torch.ops.prim.device.default:
        device: torch.device | None = getattr(args[0], "fake_device", None)
        return device
    return None


def key_of_storage(storage: torch.UntypedStorage) -> int:
    """The same for all tensors that share a storage, as long as it lives."""
    key: int = storage._cdata
    return key


@contextmanager
def imagined_ranks(world_size: int, rank: int) -> Iterator[None]:
    """The process groups of a rank among others that are not there: collectives return at once, and move nothing.

    Args:
        world_size: of all ranks.
        rank: that this process is.
    """
    # Of torch's own tests, which installed packages have too.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with _stages_agree():
            yield
    finally:
        dist.destroy_process_group()
        clear_sharding_cache()


@contextmanager
def _stages_agree() -> Iterator[None]:
    """A pipeline's stages first ask each other whether all know their shapes, which they do; older ones never ask."""
    kind: Any = pipeline_schedules._PipelineSchedule
    asks = getattr(kind, "_warmup_p2p", None)
    if asks is None:
        yield
        return

    def agree(_schedule: Any, stages: list[Any], *_options: Any) -> None:
        known: Any = pipeline_schedules
        for stage in stages:
            stage._inference_mode = known.InferenceMode.STATIC

    kind._warmup_p2p = agree
    try:
        yield
    finally:
        kind._warmup_p2p = asks
