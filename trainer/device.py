"""What the device is and can do."""

import os
import random
import resource

import numpy as np
import torch

from regrow.errors import ConfigError

__all__ = ["is_accelerator", "memory_gib", "peak_flops", "pick_device_type", "pin_threads", "seed_everything"]

# Dense bfloat16 FLOP/s from the vendors' data sheets, without sparsity.
_PEAK_BF16 = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L40S": 362e12,
}


def pick_device_type(wanted: str) -> str:
    """`cpu` or `cuda` for `auto`, else what is wanted.

    Raises:
        ConfigError: cuda is wanted where there is none.
    """
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("launch.device must not be 'cuda' where torch finds no GPU, but is; use launch.device=auto")
    return wanted


def is_accelerator(device: torch.device) -> bool:
    """Whether what runs on the device runs beside the host, which must not wait for it.

    The `meta` device counts as one, so that an accelerator's way of a step is taken where there is none.
    """
    return device.type != "cpu"


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bfloat16 peak in FLOP/s, None where it is not known."""
    return _PEAK_BF16.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def memory_gib(device: torch.device) -> float:
    """The most memory used so far: the device's, or this process' resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def pin_threads(wanted: int, local_ranks: int) -> int:
    """Sets the threads of this rank; 0 shares the cores among the host's ranks. Results depend on the number."""
    threads = wanted or max(1, len(os.sched_getaffinity(0)) // local_ranks)
    torch.set_num_threads(threads)
    return threads


def seed_everything(seed: int, *coordinates: int) -> None:
    """Seeds every generator from the run's seed and a place in the run, so that there is no state to save."""
    value = int(np.random.SeedSequence([seed, *coordinates]).generate_state(1, np.uint64)[0])
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value % 2**32)
