"""Sends a rank's files to the storage and hashes them meanwhile: from a file image, or straight from the tensors."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from regrow.checkpoint.format.hashing import BlockHasher, Hashes, block_bytes_for
from regrow.checkpoint.format.layout import Item, SavePlan, local_tensor
from regrow.checkpoint.format.torch_archive import frame_of
from regrow.checkpoint.memory import lasting_memory, raw_bytes
from regrow.checkpoint.save.progress import SaveProgress
from regrow.checkpoint.save.staging import StagingBuffer
from regrow.checkpoint.storage.base import Storage

__all__ = ["file_name", "write_image", "write_tensors"]

_WINDOW = 8 << 20
# Windows in turn: one is filled while the other is written.
_WINDOWS = 2


def file_name(rank: int, index: int, writer: str = "") -> str:
    """As stock DCP names them, but for the writer (see `Manifest`)."""
    return f"__{rank}_{index}-{writer}.distcp" if writer else f"__{rank}_{index}.distcp"


def write_image(
    folder: Storage,
    names: Sequence[str],
    image: StagingBuffer,
    pool: ThreadPoolExecutor,
    hashes: Hashes | None,
    progress: SaveProgress,
) -> Hashes:
    """Writes the image's files, durable when this returns.

    Args:
        folder: the step's folder.
        names: of the files, none of which may be there.
        image: must not change before this returns.
        pool: hashes while the files are written, unless `hashes` are known.
        hashes: of the items.
        progress: is told what has been written.

    Raises:
        OSError: the storage is full or fails.
    """
    coming = pool.submit(image.hashes) if hashes is None else None

    def write(index: int) -> None:
        memory = image.file(index)
        windows = (memory[s : s + _WINDOW] for s in range(0, len(memory), _WINDOW))
        folder.stream(names[index], len(memory), progress.counting(index, windows))

    try:
        _all_files(write, len(image.plan.file_bytes))
    finally:
        # The image may be used again only when it is no longer read.
        found = coming.result() if coming is not None else {}
    return hashes or found


def write_tensors(
    folder: Storage,
    names: Sequence[str],
    plan: SavePlan,
    tensors: Mapping[str, Tensor],
    progress: SaveProgress | None = None,
) -> Hashes:
    """Writes the files without an image of them: a few windows of memory, whatever the size of the state.

    Args:
        folder: the step's folder.
        names: of the files, none of which may be there.
        plan: the layout.
        tensors: must not change before this returns.
        progress: is told what has been written.

    Raises:
        OSError: the storage is full or fails.
    """
    found: Hashes = {}
    progress = progress or SaveProgress()

    def write(index: int) -> None:
        items = [item for item in plan.items if item.file == index]
        hashers = {item.chunk.name: BlockHasher(block_bytes_for(item.data_bytes)) for item in items}
        with ThreadPoolExecutor(1, thread_name_prefix="fill") as filler:
            windows = _filled_windows(plan.file_bytes[index], items, tensors, hashers, filler)
            folder.stream(names[index], plan.file_bytes[index], progress.counting(index, windows))
        found.update({name: hasher.blocks() for name, hasher in hashers.items()})

    _all_files(write, len(plan.file_bytes))
    return found


def _all_files(write: Callable[[int], None], files: int) -> None:
    """Runs `write` for every file at once."""
    if files < 2:
        for index in range(files):
            write(index)
        return
    with ThreadPoolExecutor(files, thread_name_prefix="write") as pool:
        for job in [pool.submit(write, index) for index in range(files)]:
            job.result()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Segment:
    """Bytes that follow each other in the file: of a tensor, or constant ones around it."""

    start: int
    stop: int
    item: Item | None
    constant: bytes = b""


def _segments(items: Sequence[Item], size: int) -> Iterator[_Segment]:
    """The whole file, without gaps."""
    position = 0
    for item in items:
        frame = frame_of(item.chunk.dtype, item.chunk.shape)
        head = bytes(item.start - position) + frame.head
        yield _Segment(start=position, stop=item.data, item=None, constant=head)
        stop = item.data + item.data_bytes
        yield _Segment(start=item.data, stop=stop, item=item)
        yield _Segment(start=stop, stop=stop + len(frame.tail), item=None, constant=frame.tail)
        position = stop + len(frame.tail)
    yield _Segment(start=position, stop=size, item=None, constant=bytes(size - position))


def _filled_windows(
    size: int,
    items: Sequence[Item],
    tensors: Mapping[str, Tensor],
    hashers: Mapping[str, BlockHasher],
    filler: ThreadPoolExecutor,
) -> Iterator[memoryview]:
    """The file's bytes in order; a window is filled and hashed while the one before is written."""
    devices = {local_tensor(tensors[i.chunk.name]).device for i in items}
    device = next((d for d in devices if d.type == "cuda"), torch.device("cpu"))
    buffers = [lasting_memory(min(_WINDOW, size), device) for _ in range(_WINDOWS)]
    flat: dict[str, Tensor] = {}
    pieces = _segments(items, size)
    current = next(pieces)

    def fill(buffer: Tensor, start: int) -> memoryview:
        nonlocal current
        stop = min(start + _WINDOW, size)
        memory = memoryview(cast(Any, buffer.numpy()))[: stop - start]
        position = start
        while position < stop:
            while position == current.stop:
                current = next(pieces)
            end = min(stop, current.stop)
            part = buffer[position - start : end - start]
            if current.item is None:
                memory[position - start : end - start] = current.constant[
                    position - current.start : end - current.start
                ]
            else:
                source = _flat_bytes(current.item, tensors, flat)
                part.copy_(source[position - current.start : end - current.start])
                hashers[current.item.chunk.name].update(memory[position - start : end - start])
            position = end
        return memory

    starts = list(range(0, size, _WINDOW))
    ahead = filler.submit(fill, buffers[0], 0)
    for index in range(len(starts)):
        window = ahead.result()
        if index + 1 < len(starts):
            ahead = filler.submit(fill, buffers[(index + 1) % _WINDOWS], starts[index + 1])
        yield window


def _flat_bytes(item: Item, tensors: Mapping[str, Tensor], flat: dict[str, Tensor]) -> Tensor:
    """The item's raw bytes; only the newest stays, since a tensor that is not contiguous is copied for it."""
    name = item.chunk.name
    if name not in flat:
        flat.clear()
        flat[name] = raw_bytes(local_tensor(tensors[name]).contiguous())
    return flat[name]
