"""Gradients of several micro-batches, added up in float32 where parameters are bfloat16.

Each is rounded to bfloat16 once; a sum in bfloat16 would lose the later ones. FSDP's sum over ranks is float32 in any
case, and so are its own sums over the micro-batches of a pipeline.
"""

from collections.abc import Collection
from typing import final

import torch
from torch import Tensor, nn

from regrow.trainer.shards import like_parameter, local_part

__all__ = ["GradientSum"]


@final
class GradientSum:
    """The sum of this rank's gradients; 4 bytes a parameter while a step has several micro-batches.

    Args:
        parameters: bfloat16, with or without gradients.
    """

    def __init__(self, parameters: Collection[nn.Parameter]) -> None:
        self._parameters = parameters
        self._sums: dict[nn.Parameter, Tensor] = {}
        for parameter in parameters:
            # The optimizer and the norm are given float32 then, which autograd would refuse.
            parameter.grad_dtype = None

    @torch.no_grad()
    def take(self) -> None:
        """Adds what the last backward pass gave, and removes it from the parameters."""
        for parameter in self._parameters:
            if parameter.grad is None:
                continue
            grad, parameter.grad = local_part(parameter.grad), None
            if parameter in self._sums:
                self._sums[parameter].add_(grad)
            else:
                self._sums[parameter] = grad.to(torch.float32)

    def give(self) -> None:
        """Makes the sums the parameters' gradients, and forgets them."""
        for parameter, total in self._sums.items():
            parameter.grad = like_parameter(total, parameter)
        self._sums.clear()
