"""Whether boxes fill a larger one exactly: no gap, no overlap, nothing beyond it."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import product

from regrow.checkpoint.format.tensor_source import Box

__all__ = ["tiles_exactly"]

# Layouts cut tensors along three dimensions at most; a box has two to this power corners.
_MOST_CUT = 4


def tiles_exactly(shape: Sequence[int], boxes: Iterable[Box]) -> bool:
    """Whether every element of the shape lies in one of the boxes, and in one alone.

    A box is known by the signs of its corners: those of a box's parts cancel out inside, so that what is left are the
    corners of the whole, exactly where the parts fill it. This takes time in the number of boxes, however they lie.

    Args:
        shape: of the whole.
        boxes: (start, stop) for each dimension; empty ones count nothing.
    """
    found = list(boxes)
    whole = tuple((0, n) for n in shape)
    if any(not 0 <= start <= stop <= n for box in found for (start, stop), n in zip(box, shape, strict=True)):
        return False
    cut = [d for d in range(len(shape)) if any(box[d] != whole[d] for box in found)]
    if len(cut) > _MOST_CUT:
        return False
    # Along dimensions that no box cuts, all are equal.
    flat = 0 in [shape[d] for d in range(len(shape)) if d not in cut]
    if flat:
        return True
    signs: dict[tuple[int, ...], int] = defaultdict(int)
    for sign, box in [(-1, whole), *((1, box) for box in found)]:
        for corner in product(*([(box[d][0], 1), (box[d][1], -1)] for d in cut)):
            value = sign
            for _, side in corner:
                value *= side
            signs[tuple(position for position, _ in corner)] += value
    return not any(signs.values())
