"""Which stored bytes a tensor needs: arithmetic on boxes, rows and blocks."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from regrow.checkpoint.errors import CheckpointError, DamagedStepError
from regrow.checkpoint.format.layout import Chunk
from regrow.checkpoint.format.rank_manifest import StoredChunk
from regrow.checkpoint.format.tensor_source import TensorInfo
from regrow.checkpoint.format.tiling import tiles_exactly

__all__ = ["ReadSlice", "bytes_to_read", "check_names", "covered", "plan_reads"]


class ReadSlice(NamedTuple):
    """The part of a stored chunk that a target needs.

    Attributes:
        item: the stored chunk.
        box: for each dimension (start, stop) of the needed part, in the whole tensor.
        rows: (first, last + 1) row of the stored chunk that is read.
    """

    item: StoredChunk
    box: tuple[tuple[int, int], ...]
    rows: tuple[int, int]

    @property
    def row_bytes(self) -> int:
        """Of one row of the stored chunk."""
        return self.item.data_bytes // self.item.shape[0] if self.item.shape else self.item.data_bytes

    @property
    def needed(self) -> tuple[int, int]:
        """The bytes of the rows, counted from the item's first."""
        return self.rows[0] * self.row_bytes, self.rows[1] * self.row_bytes

    @property
    def verified(self) -> tuple[int, int]:
        """The same, widened to whole blocks: what is read."""
        block, (start, stop) = self.item.block_bytes, self.needed
        return start // block * block, min(-(-stop // block) * block, self.item.data_bytes)


def _overlap(item: StoredChunk, target: Chunk) -> tuple[tuple[int, int], ...] | None:
    box = []
    for a, n, b, m in zip(item.offset, item.shape, target.offset, target.shape, strict=True):
        start, stop = max(a, b), min(a + n, b + m)
        if start >= stop:
            return None
        box.append((start, stop))
    return tuple(box)


def _slices(items: Sequence[StoredChunk], target: Chunk) -> Iterator[ReadSlice]:
    for item in items:
        box = _overlap(item, target)
        if box is not None:
            rows = (box[0][0] - item.offset[0], box[0][1] - item.offset[0]) if box else (0, 1)
            yield ReadSlice(item=item, box=box, rows=rows)


def _elements(pieces: Sequence[ReadSlice]) -> int:
    return sum(math.prod([stop - start for start, stop in piece.box]) for piece in pieces)


def _is_filled_by(pieces: Sequence[ReadSlice], target: Chunk) -> bool:
    if _elements(pieces) != math.prod(target.shape):
        return False
    boxes = (
        tuple((start - o, stop - o) for (start, stop), o in zip(piece.box, target.offset, strict=True))
        for piece in pieces
    )
    return len(pieces) <= 1 or tiles_exactly(target.shape, boxes)


def covered(items: Sequence[StoredChunk], target: Chunk) -> bool:
    """Whether the stored chunks fill a target."""
    return _is_filled_by(list(_slices(items, target)), target)


def plan_reads(items: Sequence[StoredChunk], target: Chunk) -> list[ReadSlice]:
    """The pieces that fill a target.

    Raises:
        DamagedStepError: the stored chunks do not cover it.
    """
    if len(items) == 1 and items[0].shape == target.shape and items[0].offset == target.offset:
        # Usually the layout is that of the save.
        (item,) = items
        box = tuple([(start, start + n) for start, n in zip(item.offset, item.shape, strict=True)])
        return [ReadSlice(item=item, box=box, rows=(0, item.shape[0]) if box else (0, 1))]
    pieces = list(_slices(items, target))
    if not _is_filled_by(pieces, target):
        raise DamagedStepError(
            f"{target.name} must be in the checkpoint once and whole, but {_elements(pieces)} of "
            f"{math.prod(target.shape)} elements are there, or some twice; the step is damaged, use another one"
        )
    return pieces


def bytes_to_read(pieces: Sequence[ReadSlice]) -> int:
    """What reading them costs."""
    return sum(stop - start for start, stop in (piece.verified for piece in pieces))


def check_names(url: str, infos: Mapping[str, TensorInfo], tensors: Mapping[str, Tensor]) -> None:
    """Whether every tensor is stored with its shape and dtype; one without elements need not be.

    Args:
        url: the checkpoint, for messages.
        infos: what is stored.
        tensors: what is asked for.

    Raises:
        CheckpointError: one is not.
    """
    missing = [name for name, tensor in tensors.items() if name not in infos and tensor.numel()]
    if missing:
        raise CheckpointError(
            f"{url} must hold {missing[0]}, but does not ({len(missing)} of {len(tensors)} names are missing); "
            "use the model it was saved from, or exclude that part with checkpoint.exclude_from_loading"
        )
    for name, tensor in tensors.items():
        info = infos.get(name)
        if info is None:
            continue
        if info.shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{name} in {url} has shape {info.shape}, but the model's has {tuple(tensor.shape)}; "
                "use the model's dimensions that it was saved with"
            )
        if info.dtype != tensor.dtype:
            raise CheckpointError(
                f"{name} in {url} is {info.dtype}, but the model's is {tensor.dtype}; go on in the precision that it "
                "was saved with, or start a new run from it with checkpoint.initial_load_path, which converts"
            )
