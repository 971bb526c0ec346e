"""What a profile and an error of memory say, in words."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

__all__ = ["allocated", "in_mib", "is_out_of_memory", "operators", "time_in_words", "waits"]

# Self time in these is waiting: for other ranks, or for the device.
_WAITS = re.compile(r"(gloo|nccl|ucc|mpi):|c10d::|c10d_functional|_c10d_|cuda\w*Synchronize|ncclDevKernel")
# Calls of Python, which a profile with stacks has beside the operators that they call.
_PYTHON = re.compile(r"\.py\(\d+\): |^<|^nn\.Module: ")
_SHOWN = 5


def in_mib(size: float) -> str:
    """Bytes in words."""
    return f"{size / 2**20:,.1f} MiB"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a rank could not get memory, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _self_time(average: Any) -> float:
    """Microseconds, on the device where it works there."""
    return float(average.self_device_time_total or average.self_cpu_time_total)


def operators(averages: Iterable[Any]) -> list[tuple[str, float, int]]:
    """What computes: name, microseconds and calls, longest first.

    Args:
        averages: torch's, of a profile.
    """
    kept = [a for a in averages if not _WAITS.search(a.key) and not _PYTHON.search(a.key)]
    found = [(str(a.key), _self_time(a), int(a.count)) for a in kept]
    return sorted(found, key=lambda item: -item[1])


def waits(averages: Iterable[Any]) -> list[tuple[str, float, int]]:
    """What waits for other ranks or for the device, as `operators`."""
    found = [(str(a.key), _self_time(a), int(a.count)) for a in averages if _WAITS.search(a.key)]
    return sorted(found, key=lambda item: -item[1])


def time_in_words(rows: Sequence[tuple[str, float, int]], whole_us: float) -> str:
    """The longest, with their parts of the whole."""
    shown = [f"{name} {us / max(1.0, whole_us):.0%} ({count}×)" for name, us, count in rows[:_SHOWN] if us > 0]
    return ", ".join(shown) or "nothing"


def allocated(named: Mapping[str, Iterable[Tensor | None]]) -> str:
    """What is held, by what it is for, largest first.

    Args:
        named: this rank's tensors.
    """
    sizes = {name: sum(_bytes(t) for t in tensors if t is not None) for name, tensors in named.items()}
    return ", ".join(f"{name} {in_mib(size)}" for name, size in sorted(sizes.items(), key=lambda item: -item[1]))


def _bytes(tensor: Tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.numel() * local.element_size()
