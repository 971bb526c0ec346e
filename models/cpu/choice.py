"""Which of torch's operators the CPU's own kernels stand in for: decided for each kind, dtype and shape.

By default for none. Whoever trains says for which, the same on all ranks; everything else is torch's own.
"""

from collections.abc import Collection, Iterable, Mapping
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["WINS_BY", "Case", "Kind", "decide", "is_used", "use"]

# A kernel must be faster than torch's operator by so much.
WINS_BY = 1.1


class Kind(Enum):
    """What is computed, and the sizes that it depends on.

    attention: batch, positions, query heads, key heads, head width.
    product: rows, features in, features out.
    norm: rows, features.
    """

    attention = "attention"
    product = "product"
    norm = "norm"


class Case(NamedTuple):
    """One operator at one shape, forward and backward."""

    kind: Kind
    dtype: torch.dtype
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.kind.value} {str(self.dtype).removeprefix('torch.')} {'x'.join(map(str, self.sizes))}"


_used: frozenset[Case] = frozenset()


def use(cases: Iterable[Case]) -> None:
    """From now on these cases, and no others, are computed by the kernels here, in this process."""
    global _used
    _used = frozenset(cases)


def is_used(kind: Kind, sizes: tuple[int, ...], *tensors: Tensor) -> bool:
    """Whether a kernel stands in: chosen, for plain tensors on a CPU, and not while torch traces."""
    if torch.compiler.is_compiling() or Case(kind, tensors[0].dtype, sizes) not in _used:
        return False
    # A subclass (DTensor) means more than its values.
    return all(type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" for t in tensors)


def decide(cases: Collection[Case], recorded: Mapping[str, bool], ratios: Mapping[str, float]) -> dict[str, bool]:
    """For each case whether the kernel is used.

    Args:
        cases: what the model does.
        recorded: what the run used before, by name, which it keeps.
        ratios: the operator's time through the kernel's, where it was measured.
    """
    return {n: recorded.get(n, ratios.get(n, 0.0) >= WINS_BY) for n in map(str, cases)}
