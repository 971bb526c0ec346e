"""The linear layer of all models: master weights may be float32 where the activations are bfloat16."""

from typing import final

import torch.nn.functional as F
from torch import Tensor, nn

from regrow.models.cpu import Kind, is_used, linear

__all__ = ["Linear"]


@final
class Linear(nn.Linear):
    """A linear layer without bias, computed in its input's dtype."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if is_used(Kind.product, (x.numel() // x.shape[-1], *self.weight.t().shape), x, self.weight):
            return linear(x, self.weight)
        return self.product(x, self.weight)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """`x @ weight.T` for this layer's weight or a part of it, in the input's dtype."""
        return F.linear(x, weight.to(x.dtype))
