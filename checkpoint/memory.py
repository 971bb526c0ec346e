"""Memory that lasts: page-aligned, in huge pages where the system has them, page-locked for copies from a GPU.

With huge pages the first touch, and the pinning of pages for a write past the page cache, cost a tenth.
"""

import ctypes
import logging
import mmap
import weakref
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

__all__ = ["lasting_memory", "raw_bytes"]

log = logging.getLogger(__name__)

_MADV_POPULATE_WRITE = 23


def raw_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, uint8 `(bytes,)`, sharing its memory."""
    # The strides of dimensions of size 1 can be anything, which `view` does not take.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def lasting_memory(size: int, device: torch.device) -> Tensor:
    """Bytes `(size,)`, at the beginning of a page, kept as long as the tensor itself (not a view of it) is.

    Args:
        size: at least 1.
        device: where copies come from. For a GPU the memory is page-locked, so that it copies beside its work;
            exactly `size` is locked, where torch's own allocator rounds up to a power of two.
    """
    mapped = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        # Not every system knows them.
        with suppress(AttributeError, OSError):
            mapped.madvise(getattr(mmap, advice))
    memory = torch.frombuffer(mapped, dtype=torch.uint8)
    if device.type != "cuda":
        return memory
    _populate(memory)
    return _locked(memory, device)


def _populate(memory: Tensor) -> None:
    """Has the system give all pages now: locking them then holds the driver, and so every kernel's launch, for less.

    Through ctypes, which lets other threads run meanwhile; systems before Linux 5.14 give them when they are locked.
    """
    ctypes.CDLL(None).madvise(
        ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(memory.numel()), ctypes.c_int(_MADV_POPULATE_WRITE)
    )


def _locked(memory: Tensor, device: torch.device) -> Tensor:
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    # Threads begin on the first GPU, which may be another rank's.
    with torch.cuda.device(device):
        if int(runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), 0)) == 0:
            weakref.finalize(memory, _unlock, memory.data_ptr(), device)
            return memory
        with suppress(RuntimeError):
            # Takes the error along, which the next kernel would be blamed for.
            torch.zeros(1, device=device)
    log.warning("%d MiB of memory cannot be page-locked in place; torch's allocator is used", memory.numel() >> 20)
    raw = torch.empty(memory.numel() + mmap.PAGESIZE, dtype=torch.uint8, pin_memory=True)
    skip = -raw.data_ptr() % mmap.PAGESIZE
    return raw[skip : skip + memory.numel()]


def _unlock(address: int, device: torch.device) -> None:
    with torch.cuda.device(device):
        torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]
