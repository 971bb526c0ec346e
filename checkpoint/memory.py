"""Memory that lasts: page-aligned, in huge pages where the system has them, page-locked for copies from a GPU.

With huge pages the first touch, and the pinning of pages for a write past the page cache, cost a tenth.
"""

import logging
import mmap
import weakref
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

__all__ = ["lasting_memory"]

log = logging.getLogger(__name__)


def lasting_memory(size: int, *, pinned: bool) -> Tensor:
    """Bytes `(size,)`, at the beginning of a page, kept as long as the tensor itself (not a view of it) is.

    Args:
        size: at least 1.
        pinned: page-locked, so that a GPU copies into it beside its work. Exactly `size` is locked, where torch's own
            allocator rounds up to a power of two.
    """
    mapped = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        # Not every system knows them.
        with suppress(AttributeError, OSError):
            mapped.madvise(getattr(mmap, advice))
    memory = torch.frombuffer(mapped, dtype=torch.uint8)
    return _locked(memory) if pinned else memory


def _locked(memory: Tensor) -> Tensor:
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    if int(runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), 0)) == 0:
        weakref.finalize(memory, runtime.cudaHostUnregister, memory.data_ptr())
        return memory
    log.warning("%d MiB of memory cannot be page-locked in place; torch's allocator is used", memory.numel() >> 20)
    raw = torch.empty(memory.numel() + mmap.PAGESIZE, dtype=torch.uint8, pin_memory=True)
    skip = -raw.data_ptr() % mmap.PAGESIZE
    return raw[skip : skip + memory.numel()]
