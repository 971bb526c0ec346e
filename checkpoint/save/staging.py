"""A rank's files as they will lie on the disk, in warm memory that every save uses again.

Heads and tails are written once; a snapshot copies raw tensor bytes into their places. First-touch page faults cost
several times the copy, so the memory stays.
"""

import itertools
from collections.abc import Mapping
from typing import Any, cast, final

import torch
from torch import Tensor

from regrow.checkpoint.format.hashing import Hashes, block_bytes_for, block_hashes
from regrow.checkpoint.format.layout import SavePlan, local_tensor
from regrow.checkpoint.format.torch_archive import frame_of
from regrow.checkpoint.memory import lasting_memory, raw_bytes
from regrow.torch_compat import foreach_copy

__all__ = ["StagingBuffer"]

# What a core's own cache holds beside its source.
_CACHED = 1 << 19


@final
class StagingBuffer:
    """Memory laid out by a plan.

    Args:
        plan: the layout.
        device: where the tensors live.
    """

    def __init__(self, plan: SavePlan, device: torch.device) -> None:
        self.plan = plan
        self._bytes = lasting_memory(max(plan.total_bytes, 1), device)
        self._bases = [0, *itertools.accumulate(plan.file_bytes)]
        self._data: dict[str, Tensor] = {}
        self._views: dict[str, Tensor] = {}
        for item in plan.items:
            frame = frame_of(item.chunk.dtype, item.chunk.shape)
            base = self._bases[item.file]
            self._write(base + item.start, frame.head)
            self._write(base + item.data + item.data_bytes, frame.tail)
            data = self._bytes[base + item.data : base + item.data + item.data_bytes]
            self._data[item.chunk.name] = data
            self._views[item.chunk.name] = data.view(item.chunk.dtype).view(item.chunk.shape)

    def _write(self, start: int, data: bytes) -> None:
        self._bytes[start : start + len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)

    @torch.no_grad()
    def copy_from(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies what the plan asks for; on an accelerator the copies are queued on the current stream."""
        sources = [local_tensor(tensors[name]) for name in self._views]
        if sources:
            foreach_copy(list(self._views.values()), sources, non_blocking=True)

    @torch.no_grad()
    def copy_hashed(self, tensors: Mapping[str, Tensor]) -> Hashes:
        """The same on a CPU, with the hashes: each part is hashed while the core's cache still has it."""
        found: Hashes = {}
        for item in self.plan.items:
            name, block = item.chunk.name, block_bytes_for(item.data_bytes)
            source, data = local_tensor(tensors[name]), self._data[name]
            if not source.is_contiguous():
                self._views[name].copy_(source)
                found[name] = block_hashes(_memory(data), block)
                continue
            raw, memory = raw_bytes(source), _memory(data)
            hashes, step = [], max(_CACHED, block)
            for start in range(0, item.data_bytes, step):
                stop = min(start + step, item.data_bytes)
                data[start:stop].copy_(raw[start:stop])
                hashes.append(block_hashes(memory[start:stop], block))
            found[name] = "".join(hashes)
        return found

    def file(self, index: int) -> memoryview:
        """One whole file, page-aligned."""
        return _memory(self._bytes[self._bases[index] : self._bases[index + 1]])

    def hashes(self) -> Hashes:
        """Of what was copied, read once more."""
        return {
            item.chunk.name: block_hashes(_memory(self._data[item.chunk.name]), block_bytes_for(item.data_bytes))
            for item in self.plan.items
        }


def _memory(tensor: Tensor) -> memoryview:
    return memoryview(cast(Any, tensor.numpy()))
