"""The training loss."""

from typing import Any

import torch
from torch import Tensor

from regrow.trainer.data.loader import IGNORE

__all__ = ["summed_cross_entropy"]

# Elements of logits that are float32 at a time: on a CPU they stay in its cache.
_CPU_ELEMENTS, _ELEMENTS = 1 << 18, 1 << 26


class _SummedCrossEntropy(torch.autograd.Function):
    """Makes the gradient in the forward pass, in the logits' dtype and some rows at a time, and keeps it alone."""

    @staticmethod
    def forward(ctx: Any, logits_SV: Tensor, labels_S: Tensor) -> Tensor:
        exact = torch.promote_types(logits_SV.dtype, torch.float32)
        grad_SV = torch.empty_like(logits_SV) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float64, device=logits_SV.device)
        elements = _CPU_ELEMENTS if logits_SV.device.type == "cpu" else _ELEMENTS
        rows = max(1, elements // logits_SV.shape[1])
        for start in range(0, logits_SV.shape[0], rows):
            part = slice(start, start + rows)
            labels_R1 = labels_S[part, None]
            counts_R1 = labels_R1 != IGNORE
            labels_R1 = labels_R1.where(counts_R1, 0)
            weights_RV = logits_SV[part].to(exact) - logits_SV[part].amax(-1, keepdim=True)
            targets_R1 = weights_RV.gather(1, labels_R1)
            # Summed by pairs, which `log_softmax` does not: over a large vocabulary it is off by parts in a million.
            sums_R1 = weights_RV.exp_().sum(-1, keepdim=True)
            total += (sums_R1.to(torch.float64).log() - targets_R1).where(counts_R1, 0.0).sum()
            if grad_SV is not None:
                weights_RV.scatter_add_(1, labels_R1, -sums_R1)
                torch.mul(weights_RV, counts_R1 / sums_R1, out=grad_SV[part])
        ctx.save_for_backward(grad_SV)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        (grad_SV,) = ctx.saved_tensors
        # In place: a second backward pass is then refused by autograd, as it is where a graph is gone.
        return grad_SV.mul_(grad), None


def summed_cross_entropy(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Cross-entropy in nats, summed over the labels that count; a float64 scalar of terms in float32 or better."""
    total: Tensor = _SummedCrossEntropy.apply(logits_BTV.flatten(0, 1), labels_BT.flatten())  # type: ignore[no-untyped-call]
    return total
