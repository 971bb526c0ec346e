"""Cross-entropy over logits whose vocabulary is sharded over ranks, without ever gathering them."""

from typing import Any

import torch
from torch import Tensor

from regrow.trainer.data.loader import IGNORE
from regrow.trainer.parallel.collectives import all_reduce_no_grad

__all__ = ["summed_vocabulary_cross_entropy"]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_SV: Tensor, labels_S: Tensor, first: int, group: str) -> Tensor:
        rows, width = logits_SV.shape
        highest = logits_SV.new_full((rows,), -torch.inf) if width == 0 else logits_SV.amax(-1)
        highest = all_reduce_no_grad(highest, "max", group)
        exponents = (logits_SV - highest[:, None]).exp()
        targets_S = labels_S - first
        here = (targets_S >= 0) & (targets_S < width)
        targets_S = targets_S.masked_fill(~here, 0)
        target = torch.zeros_like(highest)
        if width:
            target = logits_SV.gather(1, targets_S[:, None])[:, 0].masked_fill(~here, 0.0)
        parts = torch.stack([exponents.sum(-1), target]).to(torch.float64)
        sums, target = all_reduce_no_grad(parts, "sum", group).unbind()
        counts = labels_S != IGNORE
        shares = exponents / sums[:, None].to(exponents.dtype)
        ctx.save_for_backward(shares, targets_S, here & counts, counts)
        losses_S: Tensor = (sums.log() + highest - target).masked_fill(~counts, 0.0)
        return losses_S.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        shares, targets_S, here, counts = ctx.saved_tensors
        out = shares * counts[:, None]
        if out.shape[1]:
            out.scatter_add_(1, targets_S[:, None], -here[:, None].to(out.dtype))
        return out * grad, None, None, None


def summed_vocabulary_cross_entropy(logits_BTV: Tensor, labels_BT: Tensor, first: int, group: str) -> Tensor:
    """Cross-entropy in nats, summed over the labels that count; a float64 scalar of terms in float32 or better.

    Args:
        logits_BTV: this rank's part of the vocabulary.
        labels_BT: over the whole vocabulary.
        first: the first token of this rank's part of the vocabulary.
        group: the ranks' process group.
    """
    logits_SV = logits_BTV.flatten(0, 1)
    wide = logits_SV.to(torch.promote_types(logits_SV.dtype, torch.float32))
    out: Tensor = _CrossEntropy.apply(wide, labels_BT.flatten(), first, group)  # type: ignore[no-untyped-call]
    return out
