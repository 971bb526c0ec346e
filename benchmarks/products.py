"""How fast the machine multiplies the matrices of a model: what a training step could not beat."""

import time
from collections import Counter
from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor, nn

from regrow.models.base import LanguageModel

__all__ = ["Products"]


@final
class Products:
    """The matrix products of one training token batch, by `torch.mm`, each distinct shape measured once.

    Args:
        model: its linear layers are counted.
        rows: tokens of a forward pass.
        dtype: of the products.
    """

    def __init__(self, model: LanguageModel, rows: int, dtype: torch.dtype) -> None:
        shapes = Counter((m.out_features, m.in_features) for m in model.modules() if isinstance(m, nn.Linear))
        device = next(model.parameters()).device
        self._work: list[tuple[int, Tensor, Tensor, Tensor]] = [
            (
                count,
                torch.randn(rows, columns, device=device, dtype=dtype),
                torch.randn(out, columns, device=device, dtype=dtype),
                torch.randn(rows, out, device=device, dtype=dtype),
            )
            for (out, columns), count in shapes.items()
        ]

    def seconds(self) -> float:
        """What all of them take, forward and backward, for `rows` tokens."""
        return sum(self._each())

    def _each(self) -> Iterator[float]:
        for count, x, weight, grad in self._work:
            started = time.perf_counter()
            torch.mm(x, weight.t())
            torch.mm(grad, weight)
            torch.mm(grad.t(), x)
            if x.device.type == "cuda":
                torch.cuda.synchronize(x.device)
            yield count * (time.perf_counter() - started)
