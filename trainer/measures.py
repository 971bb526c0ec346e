"""Sums over tensors by name, which stay on the device until all ranks have added theirs.

Every rank has the same names in the same order, whatever it holds of them.
"""

import math
from collections.abc import Sequence
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Arriving", "Measures"]

# Elements that are looked at together: what is computed on the way is no larger.
_PART = 1 << 24
_SUMS = 4


@final
class Measures:
    """Squares, zeros, values that are not finite, and elements, summed; and the largest absolute value.

    Args:
        names: of what is told apart.
        device: of the tensors.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.names = tuple(names)
        self._at = {name: index for index, name in enumerate(self.names)}
        self._sums = torch.zeros(len(self.names), _SUMS, dtype=torch.float64, device=device)
        self._largest = torch.zeros(len(self.names), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, name: str, tensor: Tensor, *, counts: bool) -> None:
        """Adds a tensor of this rank; the device is not waited for.

        Args:
            name: where it belongs.
            tensor: of any shape and floating-point type.
            counts: false where another rank adds the same.
        """
        if not counts or tensor.numel() == 0:
            return
        index = self._at[name]
        for part in torch.split(tensor.detach().reshape(-1), _PART):
            finite = part.isfinite()
            clean = torch.where(finite, part, 0)
            norm = torch.linalg.vector_norm(clean, 2, dtype=torch.float64)
            rest = torch.stack([(part == 0).sum(), (~finite).sum()]).to(torch.float64)
            self._sums[index, 0] += norm.square()
            self._sums[index, 1:3] += rest
            self._sums[index, 3] += part.numel()
            self._largest[index] = torch.maximum(self._largest[index], clean.abs().max().to(torch.float64))

    def reduce(self, ranks: int) -> None:
        """Brings all ranks' together, with the training's own group; every rank calls it."""
        if ranks > 1:
            dist.all_reduce(self._sums)
            dist.all_reduce(self._largest, op=dist.ReduceOp.MAX)

    def norm(self, name: str) -> Tensor:
        """A scalar on the device."""
        return self._sums[self._at[name], 0].sqrt()

    def send(self) -> "Arriving":
        """Starts the copy to the host."""
        return Arriving(self.names, torch.cat([self._sums, self._largest[:, None]], dim=1))


@final
class Arriving:
    """What is on its way to the host.

    Args:
        names: of the rows.
        values: float64 `(names, sums and the largest)`, on the device.
    """

    def __init__(self, names: Sequence[str], values: Tensor) -> None:
        self._names = names
        self._event: torch.cuda.Event | None = None
        self._values = values
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def rows(self) -> dict[str, dict[str, Any]]:
        """By name, once the copy has arrived; what no rank has added anything to is left out."""
        if self._event is not None:
            self._event.synchronize()
        found = {}
        for name, (squares, zeros, bad, elements, largest) in zip(self._names, self._values.tolist(), strict=True):
            if elements:
                found[name] = {
                    "norm": math.sqrt(squares),
                    "rms": math.sqrt(squares / elements),
                    "max": largest,
                    "zeros": zeros / elements,
                    "not_finite": int(bad),
                }
        return found
