"""A rank's files as they will lie on the disk, in warm memory that every save uses again.

Heads and tails are written once; a snapshot copies raw tensor bytes into their places. First-touch page faults cost
several times the copy, so the memory stays.
"""

import itertools
import mmap
from collections.abc import Mapping
from typing import Any, cast, final

import torch
from torch import Tensor

from checkpoint.plan import SavePlan, local_tensor
from checkpoint.stream import frame_of

__all__ = ["FileImage"]


@final
class FileImage:
    """Memory laid out by a plan.

    Args:
        plan: the layout.
        pinned: page-locked memory, for copies from an accelerator.
    """

    def __init__(self, plan: SavePlan, *, pinned: bool) -> None:
        self.plan = plan
        size = max(plan.total_bytes, 1)
        self._memory: mmap.mmap | None = None
        if pinned:
            # One page more than needed, so that the image can begin on a page.
            raw = torch.empty(size + mmap.PAGESIZE, dtype=torch.uint8, pin_memory=True)
            skip = -raw.data_ptr() % mmap.PAGESIZE
            self._bytes = raw[skip : skip + size]
        else:
            self._memory = mmap.mmap(-1, size)
            self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._bases = [0, *itertools.accumulate(plan.file_bytes)]
        self._views: dict[str, Tensor] = {}
        for item in plan.items:
            frame = frame_of(item.chunk.dtype, item.chunk.shape)
            base = self._bases[item.file]
            self._write(base + item.start, frame.head)
            self._write(base + item.data + item.data_bytes, frame.tail)
            data = self._bytes[base + item.data : base + item.data + item.data_bytes]
            self._views[item.chunk.name] = data.view(item.chunk.dtype).view(item.chunk.shape)

    def _write(self, start: int, data: bytes) -> None:
        self._bytes[start : start + len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)

    @torch.no_grad()
    def copy_from(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies what the plan asks for; on an accelerator the copies are queued on the current stream."""
        for name, view in self._views.items():
            view.copy_(local_tensor(tensors[name]), non_blocking=True)

    def file(self, index: int) -> memoryview:
        """One whole file, page-aligned."""
        return memoryview(cast(Any, self._bytes[self._bases[index] : self._bases[index + 1]].numpy()))
