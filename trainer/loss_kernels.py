"""The passes over logits that a loss needs, each as one expression, of which a compiler makes one kernel.

Operator by operator a GPU goes through the logits six times, three of them in float32; by kernels it goes twice,
reading them, and writes the gradient once.

Shapes: R rows, V vocabulary, or this rank's part of it.
"""

import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["LossKernels", "compiled_kernels", "row_gradient", "row_statistics"]


def row_statistics(logits_RV: Tensor, labels_R1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row its highest logit, the sum of its exponents less that, and its label's logit.

    Args:
        logits_RV: with at least one token.
        labels_R1: int64, within `logits_RV`.

    Returns:
        Three of `(R, 1)`, float32 or better.
    """
    wide_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
    highest_R1 = wide_RV.amax(-1, keepdim=True)
    return highest_R1, (wide_RV - highest_R1).exp().sum(-1, keepdim=True), wide_RV.gather(1, labels_R1)


def row_gradient(
    out_RV: Tensor,
    logits_RV: Tensor,
    highest_R1: Tensor,
    totals_R1: Tensor,
    labels_R1: Tensor,
    here_R1: Tensor,
    counts_R1: Tensor,
    more_R1: Tensor | None,
) -> None:
    """Writes the gradient of the rows' losses.

    Args:
        out_RV: takes it; may be `logits_RV` itself.
        logits_RV: this rank's part.
        highest_R1: see `row_statistics`.
        totals_R1: the sums over the whole vocabulary, in units of this rank's own.
        labels_R1: int64, within `logits_RV`.
        here_R1: whether the label is in this rank's part.
        counts_R1: whether the row counts.
        more_R1: what the shares are multiplied by (z-loss); None: nothing.
    """
    weights_RV = (logits_RV.to(highest_R1.dtype) - highest_R1).exp()
    if more_R1 is not None:
        weights_RV = weights_RV * more_R1.to(weights_RV.dtype)
    tokens_V = torch.arange(logits_RV.shape[1], device=logits_RV.device)
    hits_RV = (tokens_V == labels_R1) & here_R1
    out_RV.copy_((weights_RV - totals_R1.where(hits_RV, 0.0)) * (counts_R1 / totals_R1))


class LossKernels(NamedTuple):
    """`row_statistics` and `row_gradient`, as they are or compiled."""

    statistics: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    gradient: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None], None]


@functools.cache
def compiled_kernels(backend: str) -> LossKernels:
    """Kernels for each size of vocabulary, and for any number of rows from the second one on.

    What asks for more variants than torch's compiler keeps of one function is done operator by operator.

    Args:
        backend: torch.compile's.
    """
    # Said where rows are few, of which nobody need know.
    warnings.filterwarnings("ignore", message=r"\s*Online softmax is disabled on the fly")
    return LossKernels(torch.compile(row_statistics, backend=backend), torch.compile(row_gradient, backend=backend))
