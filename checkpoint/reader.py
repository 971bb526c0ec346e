"""Reads a step into existing tensors: only the ranges that they need, every byte verified before it is copied."""

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import xxhash
from torch import Tensor

from checkpoint.contents import StoredItem
from checkpoint.errors import CheckpointError, DamagedStepError
from checkpoint.hashing import BLOCK_BYTES, item_hash
from checkpoint.plan import Chunk, chunk_of, local_tensor

__all__ = ["ReadPiece", "bytes_to_read", "check_names", "plan_reads", "read_chunk", "read_tensors"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadPiece:
    """The part of a stored chunk that a target needs.

    Attributes:
        item: the stored chunk.
        box: for each dimension (start, stop) of the needed part, in the whole tensor.
        rows: (first, last + 1) row of the stored chunk that is read.
    """

    item: StoredItem
    box: tuple[tuple[int, int], ...]
    rows: tuple[int, int]


def _overlap(item: StoredItem, target: Chunk) -> tuple[tuple[int, int], ...] | None:
    box = []
    for a, n, b, m in zip(item.offset, item.shape, target.offset, target.shape, strict=True):
        start, stop = max(a, b), min(a + n, b + m)
        if start >= stop:
            return None
        box.append((start, stop))
    return tuple(box)


def plan_reads(items: Sequence[StoredItem], target: Chunk) -> list[ReadPiece]:
    """The pieces that fill a target.

    Raises:
        DamagedStepError: the stored chunks do not cover it.
    """
    pieces, covered = [], 0
    for item in items:
        box = _overlap(item, target)
        if box is None:
            continue
        rows = (box[0][0] - item.offset[0], box[0][1] - item.offset[0]) if box else (0, 1)
        pieces.append(ReadPiece(item=item, box=box, rows=rows))
        covered += torch.Size([stop - start for start, stop in box]).numel()
    if covered != torch.Size(target.shape).numel():
        raise DamagedStepError(
            f"{target.name} is not whole in the checkpoint: {covered} of {torch.Size(target.shape).numel()} "
            "elements are there; the step is damaged, use another one"
        )
    return pieces


def _byte_range(piece: ReadPiece) -> tuple[int, int]:
    """The verified range: the piece's rows, widened to whole blocks of the item."""
    item = piece.item
    row_bytes = item.data_bytes // item.shape[0] if item.shape else item.data_bytes
    start = piece.rows[0] * row_bytes // BLOCK_BYTES * BLOCK_BYTES
    stop = min(-(-piece.rows[1] * row_bytes // BLOCK_BYTES) * BLOCK_BYTES, item.data_bytes)
    return start, stop


def bytes_to_read(pieces: Sequence[ReadPiece]) -> int:
    """What reading them costs."""
    return sum(stop - start for start, stop in map(_byte_range, pieces))


def read_tensors(
    folder: Path, items: Sequence[StoredItem], tensors: Mapping[str, Tensor], *, threads: int = 4
) -> int:
    """Fills the tensors' local parts in place; returns the bytes read.

    Raises:
        CheckpointError: a name is missing, or has another shape or dtype.
        DamagedStepError: naming file and tensor.
    """
    by_name = check_names(folder, items, tensors)
    with ExitStack() as opened:
        files: dict[str, int] = {}
        for name in sorted({item.file for item in items}):
            files[name] = os.open(folder / name, os.O_RDONLY)
            opened.callback(os.close, files[name])
        with ThreadPoolExecutor(threads) as pool:
            jobs = [
                pool.submit(_fill, folder, files, by_name[name], name, tensor) for name, tensor in tensors.items()
            ]
            return sum(job.result() for job in jobs)


def check_names(
    folder: Path, items: Sequence[StoredItem], tensors: Mapping[str, Tensor]
) -> Mapping[str, list[StoredItem]]:
    """The stored chunks by tensor, once every tensor is known to be there with its shape and dtype.

    Raises:
        CheckpointError: one is not.
    """
    stored: dict[str, list[StoredItem]] = defaultdict(list)
    for item in items:
        stored[item.name].append(item)
    missing = [name for name in tensors if name not in stored]
    if missing:
        raise CheckpointError(
            f"{folder} must hold {missing[0]}, but does not ({len(missing)} of {len(tensors)} names are missing); "
            "use the model it was saved from, or exclude that part with checkpoint.exclude_from_loading"
        )
    for name, tensor in tensors.items():
        item = stored[name][0]
        if item.global_shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{name} in {folder} has shape {item.global_shape}, but the model's has {tuple(tensor.shape)}; "
                "use the model's dimensions that it was saved with"
            )
        if item.torch_dtype != tensor.dtype:
            raise CheckpointError(
                f"{name} in {folder} is {item.torch_dtype}, but the model's is {tensor.dtype}; "
                "convert the checkpoint first"
            )
    return stored


def _fill(folder: Path, files: Mapping[str, int], items: Sequence[StoredItem], name: str, tensor: Tensor) -> int:
    return read_chunk(folder, files, items, chunk_of(name, tensor), local_tensor(tensor))


def read_chunk(
    folder: Path, files: Mapping[str, int], items: Sequence[StoredItem], target: Chunk, local: Tensor
) -> int:
    """Fills one box of a tensor from its stored chunks, verified; returns the bytes read.

    Args:
        folder: the step's, for messages.
        files: descriptors by name.
        items: the tensor's stored chunks.
        target: which box.
        local: receives it.
    """
    if local.numel() == 0:
        return 0
    read = 0
    for piece in plan_reads(items, target):
        read += _read_piece(folder, files[piece.item.file], piece, target, local)
    return read


def _read_piece(folder: Path, file: int, piece: ReadPiece, target: Chunk, local: Tensor) -> int:
    """Reads and verifies the piece's blocks, then copies the needed box."""
    item, (start, stop) = piece.item, _byte_range(piece)
    whole = start == 0 and stop == item.data_bytes and item.offset == target.offset and item.shape == target.shape
    straight = whole and local.device.type == "cpu" and local.is_contiguous()
    scratch = local.reshape(-1).view(torch.uint8) if straight else torch.empty(stop - start, dtype=torch.uint8)
    memory = memoryview(cast(Any, scratch.numpy()))
    _read_all(folder, file, memory, item, start)
    _verify(folder, memory, item, start)
    if not straight:
        _copy_box(scratch, piece, start, target, local)
    return stop - start


def _read_all(folder: Path, file: int, memory: memoryview, item: StoredItem, start: int) -> None:
    done = 0
    while done < len(memory):
        got = os.preadv(file, [memory[done:]], item.data + start + done)
        if got == 0:
            raise DamagedStepError(
                f"{folder / item.file} ends within {item.name}; the step is damaged, use another one"
            )
        done += got


def _verify(folder: Path, memory: memoryview, item: StoredItem, start: int) -> None:
    """Compares each block with its hash, and the hashes with the item's."""
    sound = item_hash(list(item.blocks)) == item.hash
    for i in range(0, len(memory), BLOCK_BYTES):
        expected = item.blocks[(start + i) // BLOCK_BYTES]
        sound = sound and xxhash.xxh3_128_hexdigest(memory[i : i + BLOCK_BYTES]) == expected
    if not sound:
        raise DamagedStepError(
            f"{item.name} in {folder / item.file} does not match its hash; the step is damaged, use another one"
        )


def _copy_box(scratch: Tensor, piece: ReadPiece, start: int, target: Chunk, local: Tensor) -> None:
    item = piece.item
    if not item.shape:
        local.copy_(scratch.view(item.torch_dtype).view(()))
        return
    row_bytes = item.data_bytes // item.shape[0]
    first = piece.rows[0] * row_bytes - start
    # The blocks begin wherever the row does; a copy aligns them for the dtype.
    raw = scratch[first : first + (piece.rows[1] - piece.rows[0]) * row_bytes]
    raw = raw if (raw.data_ptr() % 16) == 0 else raw.clone()
    source = raw.view(item.torch_dtype).view(piece.rows[1] - piece.rows[0], *item.shape[1:])
    destination = local
    for dim, (low, high) in enumerate(piece.box):
        if dim > 0:
            source = source.narrow(dim, low - item.offset[dim], high - low)
        destination = destination.narrow(dim, low - target.offset[dim], high - low)
    destination.copy_(source)
