"""The weighted mean of several checkpoints' tensors, box by box."""

import math
from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from regrow.checkpoint.errors import CheckpointError
from regrow.checkpoint.format.tensor_source import Box, TensorInfo, TensorSource

__all__ = ["AveragedSource", "shares_of"]


def shares_of(count: int, weights: Sequence[float] | None, decay: float | None) -> list[float]:
    """The share that each checkpoint has, in the order in which they are given.

    Args:
        count: how many there are.
        weights: of each; None makes them alike.
        decay: each one's share is this times that of the one after it, as in an exponential moving average.

    Raises:
        CheckpointError: they are no shares.
    """
    if weights is not None and decay is not None:
        raise CheckpointError("--weights must be given without --decay, but both are; leave one out")
    if decay is not None:
        if not 0.0 < decay <= 1.0:
            raise CheckpointError(f"--decay must be above 0 and at most 1, but is {decay:g}; use 0.9")
        weights = [decay ** (count - 1 - n) for n in range(count)]
    weights = [1.0] * count if weights is None else list(weights)
    if len(weights) != count:
        raise CheckpointError(
            f"--weights must be as many as checkpoints ({count}), but are {len(weights)}; give one for each"
        )
    total = math.fsum(weights)
    if not all(map(math.isfinite, weights)) or total <= 0:
        raise CheckpointError(f"--weights must have a sum above 0, but have {total:g}; give others")
    return [weight / total for weight in weights]


@final
class AveragedSource(TensorSource):
    """A mean of sources, summed in float32 or better and rounded once, to the first one's types.

    What is no floating-point number must be the same in all of them.

    Args:
        sources: with the same tensors.
        shares: of each; their sum is 1.

    Raises:
        CheckpointError: they do not hold the same tensors.
    """

    def __init__(self, sources: Sequence[TensorSource], shares: Sequence[float]) -> None:
        self._sources, self._shares = list(sources), list(shares)
        first = self._sources[0]
        self.place, self.infos = first.place, dict(first.infos)
        for other in self._sources[1:]:
            _check_same(first, other)

    def read(self, name: str, box: Box) -> Tensor:
        value = self._sources[0].read(name, box)
        if not value.dtype.is_floating_point:
            for other in self._sources[1:]:
                if not torch.equal(value, other.read(name, box)):
                    raise CheckpointError(
                        f"{name} must be the same in all checkpoints, because its numbers are whole, but differs in "
                        f"{other.place}; average checkpoints of one run"
                    )
            return value
        wide = torch.promote_types(value.dtype, torch.float32)
        total = value.to(wide).mul_(self._shares[0]) if value.dtype != wide else value * self._shares[0]
        for share, other in zip(self._shares[1:], self._sources[1:], strict=True):
            total.add_(other.read(name, box).to(wide), alpha=share)
        return total.to(value.dtype)

    def close(self) -> None:
        for source in self._sources:
            source.close()


def _check_same(first: TensorSource, other: TensorSource) -> None:
    a: Mapping[str, TensorInfo] = first.infos
    b: Mapping[str, TensorInfo] = other.infos
    for here, there, place in ((a, b, other.place), (b, a, first.place)):
        lacking = sorted(here.keys() - there.keys())
        if lacking:
            raise CheckpointError(
                f"checkpoints that are averaged must hold the same tensors, but {place} lacks {lacking[0]} "
                f"({len(lacking)} such names); average checkpoints of one model"
            )
    for name, info in a.items():
        if info.shape != b[name].shape:
            raise CheckpointError(
                f"checkpoints that are averaged must hold tensors of the same shapes, but {name} is {info.shape} in "
                f"{first.place} and {b[name].shape} in {other.place}; average checkpoints of one model"
            )
