"""What a step's hashes do not cover: the heads and tails of its streams, and the gaps between them.

Our own reader needs none of it. Stock readers do: they find a tensor by its stream's head and tail.
"""

import io
import pickle
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch

from regrow.checkpoint.format.hashing import block_hashes
from regrow.checkpoint.format.rank_manifest import StoredChunk
from regrow.checkpoint.format.torch_archive import frame_of
from regrow.checkpoint.memory import raw_bytes
from regrow.checkpoint.storage.base import RangeReader, Storage

__all__ = ["stream_problems"]

_GAP_BYTES = 1 << 20


def stream_problems(
    folder: Storage, items: Sequence[StoredChunk], sizes: dict[str, int], torch_version: str
) -> list[str]:
    """What is wrong around the tensors' bytes, a sentence each.

    Args:
        folder: the step.
        items: all of its chunks, whose data were verified.
        sizes: bytes of its files.
        torch_version: that wrote it. Another one's streams may have other heads and tails, and are read by torch.
    """
    by_file: dict[str, list[StoredChunk]] = defaultdict(list)
    for item in items:
        by_file[item.file].append(item)
    problems: list[str] = []
    for name, stored in sorted(by_file.items()):
        stored.sort(key=lambda i: i.start)
        with folder.open(name) as file:
            for item in stored:
                if not _is_framed(file, item) and (_minor(torch_version) == _OWN or not _is_read(file, item)):
                    problems.append(f"the stream of {item.name} in {folder.url}/{name} is damaged around its data")
            for start, stop in _gaps(stored, sizes.get(name, 0)):
                if any(any(_read(file, at, min(_GAP_BYTES, stop - at))) for at in range(start, stop, _GAP_BYTES)):
                    problems.append(f"{folder.url}/{name} must hold zeros from byte {start} to {stop}, but does not")
    return problems


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


_OWN = _minor(str(torch.__version__))


def _is_framed(file: RangeReader, item: StoredChunk) -> bool:
    """Whether the head and the tail are the ones that this torch writes."""
    frame = frame_of(item.torch_dtype, item.shape)
    end = item.data + item.data_bytes
    return (
        (item.start + len(frame.head), item.size) == (item.data, frame.size)
        and _read(file, item.start, len(frame.head)) == frame.head
        and _read(file, end, len(frame.tail)) == frame.tail
    )


def _is_read(file: RangeReader, item: StoredChunk) -> bool:
    """Whether torch reads the tensor's bytes out of the stream."""
    try:
        loaded = torch.load(io.BytesIO(_read(file, item.start, item.size)), map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, OSError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile):
        return False
    if not isinstance(loaded, torch.Tensor) or (loaded.dtype, tuple(loaded.shape)) != (item.torch_dtype, item.shape):
        return False
    data = memoryview(cast(Any, raw_bytes(loaded.detach().contiguous()).numpy()))
    return block_hashes(data, item.block_bytes) == item.blocks


def _gaps(stored: Sequence[StoredChunk], size: int) -> Iterator[tuple[int, int]]:
    """The runs of bytes that belong to no stream."""
    position = 0
    for item in stored:
        if item.start > position:
            yield position, item.start
        position = item.start + item.size
    if position < size:
        yield position, size


def _read(file: RangeReader, offset: int, size: int) -> bytes:
    memory = bytearray(size)
    return bytes(memory[: file.read_into(offset, memoryview(memory))])
