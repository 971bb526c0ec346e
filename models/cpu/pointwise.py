"""RMSNorm in blocks of rows that stay in the cache, keeping only what they were given.

Inner values are float32 or better. Shapes: S rows, D features; R rows of a block.
"""

from typing import Any

import torch
from torch import Tensor

__all__ = ["rms_norm"]

# Elements of a block.
_ELEMENTS = 1 << 17


def _blocks(rows: int, width: int) -> list[slice]:
    step = max(1, _ELEMENTS // width)
    return [slice(start, start + step) for start in range(0, rows, step)]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        x_SD, out_SD = x.reshape(-1, x.shape[-1]), torch.empty(x.shape, dtype=x.dtype).view(-1, x.shape[-1])
        scale_S1 = torch.empty((x_SD.shape[0], 1), dtype=exact)
        for rows in _blocks(*x_SD.shape):
            # Summed by pairs, which `vector_norm` does not: over 16,384 features it is off by 1e-5.
            mean_R1 = x_SD[rows].to(exact).square().sum(-1, keepdim=True).div_(x.shape[-1])
            torch.rsqrt(mean_R1.add_(eps), out=scale_S1[rows])
            torch.mul(x_SD[rows] * scale_S1[rows], weight_D, out=out_SD[rows])
        ctx.save_for_backward(x_SD, weight_D, scale_S1)
        return out_SD.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x_SD, weight_D, scale_S1 = ctx.saved_tensors
        width, exact = x_SD.shape[1], scale_S1.dtype
        grad_SD, grad_x_SD = grad.reshape(-1, width), torch.empty(x_SD.shape, dtype=x_SD.dtype)
        grad_w_D = torch.zeros(width, dtype=torch.float64)
        for rows in _blocks(*x_SD.shape):
            unit_RD = x_SD[rows] * scale_S1[rows]
            grad_RD = grad_SD[rows].to(exact)
            grad_w_D += (grad_RD * unit_RD).sum(0)
            grad_RD = grad_RD * weight_D
            along_R1 = (grad_RD * unit_RD).sum(-1, keepdim=True).div_(-width)
            torch.mul(grad_RD.addcmul_(unit_RD, along_R1), scale_S1[rows], out=grad_x_SD[rows])
        return grad_x_SD.view(grad.shape), grad_w_D.to(weight_D.dtype), None


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x²) + eps) * weight`, over the last dimension, in x's dtype."""
    out: Tensor = _RMSNorm.apply(x, weight_D, eps)  # type: ignore[no-untyped-call]
    return out
