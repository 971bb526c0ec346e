"""Which tensors of two checkpoints differ, and by how much; formats and types may differ."""

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from regrow.checkpoint.format.tensor_source import TensorSource, segments, whole
from regrow.checkpoint.load.initial_load import weights_of

__all__ = ["Change", "Difference", "compare"]

_PIECE_BYTES = 32 << 20
_COUNTERS = "train_state."


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One tensor that differs.

    Attributes:
        name: of the tensor.
        elements: how many differ.
        of: how many there are.
        largest: of the absolute differences.
        relative: that, by the largest absolute value on the left.
    """

    name: str
    elements: int
    of: int
    largest: float
    relative: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """All that differs.

    Attributes:
        only_left: names.
        only_right: names.
        shapes: names with both shapes.
        changes: tensors with other values.
        rounded: how many tensors have another type, and the same values in the smaller one.
        compared: tensors in all.
    """

    only_left: list[str] = field(default_factory=list)
    only_right: list[str] = field(default_factory=list)
    shapes: dict[str, list[list[int]]] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    rounded: int = 0
    compared: int = 0

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """One for each difference; none where there is none."""
        return [
            *(f"only on the left: {n}" for n in self.only_left),
            *(f"only on the right: {n}" for n in self.only_right),
            *(f"{n}: shape {a} on the left, {b} on the right" for n, (a, b) in self.shapes.items()),
            *(
                f"{c.name}: {c.elements:,} of {c.of:,} elements differ, by at most {c.largest:.3g} "
                f"({c.relative:.1e} of the largest value)"
                for c in self.changes
            ),
        ]


def compare(a: TensorSource, b: TensorSource, *, skip: Collection[str] = (), threads: int = 4) -> Difference:
    """Compares two checkpoints under the same names.

    Where one holds weights alone, weights are compared alone. Where types differ, both are brought to the smaller.

    Args:
        a: the left one.
        b: the right one.
        skip: names to leave out.
        threads: at work.
    """
    left, right = weights_of(a), weights_of(b)
    if len(left) < len(a.infos) and len(right) < len(b.infos):
        left, right = list(a.infos), list(b.infos)
        # Other programs' counters are no tensors.
        if not any(n.startswith(_COUNTERS) for n in left) or not any(n.startswith(_COUNTERS) for n in right):
            left, right = ([n for n in names if not n.startswith(_COUNTERS)] for names in (left, right))
    left, right = [n for n in left if n not in skip], [n for n in right if n not in skip]
    both = [n for n in left if n in set(right)]
    shapes = {
        n: [list(a.infos[n].shape), list(b.infos[n].shape)] for n in both if a.infos[n].shape != b.infos[n].shape
    }
    same_shape = [n for n in both if n not in shapes]
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(lambda n: _change(a, b, n), same_shape))
    changes = [c for c in found if c is not None]
    changed = {c.name for c in changes}
    return Difference(
        only_left=[n for n in left if n not in set(right)],
        only_right=[n for n in right if n not in set(left)],
        shapes=shapes,
        changes=changes,
        rounded=sum(a.infos[n].dtype != b.infos[n].dtype for n in same_shape if n not in changed),
        compared=len(both),
    )


def _change(a: TensorSource, b: TensorSource, name: str) -> Change | None:
    left, right = a.infos[name], b.infos[name]
    smaller = min(left.dtype, right.dtype, key=lambda d: d.itemsize)
    elements, total, largest, scale = 0, 0, 0.0, 0.0
    for box in segments(whole(left.shape), max(left.dtype.itemsize, right.dtype.itemsize), _PIECE_BYTES):
        x, y = a.read(name, box).to(smaller), b.read(name, box).to(smaller)
        total += x.numel()
        scale = max(scale, float(x.double().abs().max())) if x.numel() else scale
        # Bitwise, so that a NaN equals itself.
        if torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8)):
            continue
        differs = (x != y) & ~(x.isnan() & y.isnan())
        elements += int(differs.sum())
        gap = (x.double() - y.double()).abs()[differs]
        largest = max(largest, float(gap.max())) if gap.numel() else largest
    if not elements:
        return None
    return Change(
        name=name,
        elements=elements,
        of=total,
        largest=largest,
        relative=largest / scale if scale else float("inf"),
    )
