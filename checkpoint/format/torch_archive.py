"""What surrounds a tensor's bytes in a `.distcp` file.

Such a file is a row of `torch.save` streams. For one dtype and shape everything but the raw bytes is always the
same (torch's reader does not check the record's CRC), so it is made once and kept; see docs/checkpoint-format.md.
"""

import functools
import os
import struct
from dataclasses import dataclass
from typing import final

import torch

from regrow.checkpoint.scratch import scratch_folder
from regrow.torch_compat import FakeTensorMode

__all__ = ["ArchiveFrame", "frame_of"]

_RECORD = b"archive/data/0"
_EDGE = 1 << 16
_LARGE = 1 << 18


@dataclass(frozen=True, kw_only=True, slots=True)
class ArchiveFrame:
    """The constant part of a tensor's stream.

    Attributes:
        head: bytes before the data; the data begins 64-byte aligned.
        data_bytes: bytes of data between.
        tail: bytes after the data.
    """

    head: bytes
    data_bytes: int
    tail: bytes

    @property
    def size(self) -> int:
        """Bytes of the whole stream."""
        return len(self.head) + self.data_bytes + len(self.tail)


@final
class _Edges:
    """A file that keeps its first and last bytes alone."""

    def __init__(self) -> None:
        self.size = 0
        self.first = b""
        self.last = b""

    def write(self, data: bytes) -> int:
        if len(self.first) < _EDGE:
            self.first += bytes(data[: _EDGE - len(self.first)])
        self.last = (self.last + bytes(data[-_EDGE:]))[-_EDGE:]
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Nothing is buffered."""


def _save_without_data(dtype: torch.dtype, shape: tuple[int, ...]) -> _Edges:
    """The edges of a stream whose data is a hole in a file: torch would copy and sum up every byte of zeros."""
    edges = _Edges()
    with scratch_folder() as folder:
        # The archive's name inside the stream is the file's; a stream into memory is called `archive`.
        path = folder / "archive"
        with FakeTensorMode():
            tensor = torch.empty(shape, dtype=dtype)
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(tensor, path)
        edges.size = path.stat().st_size
        with path.open("rb") as file:
            edges.first = file.read(_EDGE)
            file.seek(-min(_EDGE, edges.size), os.SEEK_END)
            edges.last = file.read()
    return edges


@functools.lru_cache(maxsize=4096)
def frame_of(dtype: torch.dtype, shape: tuple[int, ...]) -> ArchiveFrame:
    """The frame for a contiguous CPU tensor; costs one small `torch.save`."""
    edges = _Edges()
    if torch.Size(shape).numel() > _LARGE:
        edges = _save_without_data(dtype, shape)
    else:
        torch.save(torch.zeros(shape, dtype=dtype), edges)  # type: ignore[arg-type]
    name = edges.first.find(_RECORD)
    assert name >= 30, "torch.save's container has changed"
    # A zip local file header: 26 bytes to the lengths of the name and of the extra field, 30 to the name.
    name_length, extra_length = struct.unpack("<HH", edges.first[name - 4 : name])
    begin = name + name_length + extra_length
    data_bytes = torch.empty(0, dtype=dtype).element_size() * torch.Size(shape).numel()
    tail_length = edges.size - begin - data_bytes
    assert 0 < tail_length <= _EDGE, "torch.save's container has changed"
    return ArchiveFrame(head=edges.first[:begin], data_bytes=data_bytes, tail=edges.last[-tail_length:])
