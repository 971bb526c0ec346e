"""The experts of a mixture: SwiGLU on rows that are sorted by expert, as grouped products.

A row's weight is multiplied into its hidden activations, so that the results only have to be added, and the weight's
gradient needs nothing of width D: the expert is linear from there on.

Shapes: R rows, E experts, D model width, F an expert's width; I and O the widths in and out of a product.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regrow.torch_compat import grouped_product, silu_gradient

__all__ = ["EXPERT_PRODUCTS", "Experts"]


class Experts(nn.Module):
    """SwiGLU experts, their weights stacked: `w1` and `w3` `(E, F, D)`, `w2` `(E, D, F)`."""

    def __init__(self, dim: int, ffn_dim: int, n_experts: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(n_experts, ffn_dim, dim))
        self.w2 = nn.Parameter(torch.empty(n_experts, dim, ffn_dim))
        self.w3 = nn.Parameter(torch.empty(n_experts, ffn_dim, dim))

    def forward(self, rows_RD: Tensor, weights_R: Tensor, ends_E: Tensor) -> Tensor:
        """The experts' results, weighted.

        Args:
            rows_RD: sorted by expert.
            weights_R: of each row.
            ends_E: int32, the rows up to and including each expert's; the last is R.
        """
        return self.compute(rows_RD, weights_R, ends_E, self.w1, self.w2, self.w3)

    @staticmethod
    def compute(rows_RD: Tensor, weights_R: Tensor, ends_E: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
        """The same with given weights. Of what has R rows, `rows_RD` and three of width F are kept for gradients."""
        gate_RF, up_RF = _grouped(rows_RD, w1, ends_E), _grouped(rows_RD, w3, ends_E)
        hidden_RF: Tensor = _WeightedSwiGlu.apply(gate_RF, up_RF, weights_R.to(gate_RF.dtype))  # type: ignore[no-untyped-call]
        return _grouped(hidden_RF, w2, ends_E)


class _WeightedSwiGlu(torch.autograd.Function):
    """`silu(gate) · up · weight`; keeps its inputs alone, where autograd would keep two products more."""

    @staticmethod
    def forward(ctx: Any, gate_RF: Tensor, up_RF: Tensor, weights_R: Tensor) -> Tensor:
        ctx.save_for_backward(gate_RF, up_RF, weights_R)
        return F.silu(gate_RF).mul_(up_RF).mul_(weights_R[:, None])

    @staticmethod
    def backward(ctx: Any, grad_RF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate_RF, up_RF, weights_R = ctx.saved_tensors
        silu_RF = F.silu(gate_RF)
        weights_grad_R = (grad_RF * silu_RF).mul_(up_RF).sum(-1)
        weighted_RF = grad_RF * weights_R[:, None]
        up_grad_RF = silu_RF.mul_(weighted_RF)
        return silu_gradient(weighted_RF.mul_(up_RF), gate_RF), up_grad_RF, weights_grad_R


def _grouped(x_RI: Tensor, w_EOI: Tensor, ends_E: Tensor) -> Tensor:
    w_EOI = w_EOI.to(x_RI.dtype)
    if x_RI.shape[0] == 0:
        # No rows: a result through which input and weights still get a gradient, zero.
        return x_RI @ w_EOI[0].T
    if x_RI.dtype == torch.float64 or (x_RI.dtype != torch.bfloat16 and torch.compiler.is_compiling()):
        out: Tensor = _exact_product(x_RI, w_EOI, ends_E)
        return out
    return F.grouped_mm(x_RI, w_EOI.transpose(1, 2), offs=ends_E)


# torch's grouped product knows no float64, and compiled bfloat16 alone. Other dtypes are there to check numerics:
# the host may look then, as it does in torch's own product of them.


def _parts(x_RI: Tensor, ends_E: Tensor) -> list[Tensor]:
    ends = ends_E.tolist()
    return [x_RI[a:b] for a, b in zip([0, *ends], ends, strict=False)]


@torch.library.custom_op("regrow::exact_grouped_product", mutates_args=())
def _exact_product(x_RI: Tensor, w_EOI: Tensor, ends_E: Tensor) -> Tensor:
    return torch.cat([x @ w.T for x, w in zip(_parts(x_RI, ends_E), w_EOI, strict=True)])


@torch.library.custom_op("regrow::exact_grouped_gradient", mutates_args=())
def _exact_gradient(grad_RO: Tensor, x_RI: Tensor, ends_E: Tensor) -> Tensor:
    pairs = zip(_parts(grad_RO, ends_E), _parts(x_RI, ends_E), strict=True)
    return torch.stack([grad.T @ x for grad, x in pairs])


@_exact_product.register_fake
def _(x_RI: Tensor, w_EOI: Tensor, _ends_E: Tensor) -> Tensor:
    return x_RI.new_empty(x_RI.shape[0], w_EOI.shape[1])


@_exact_gradient.register_fake
def _(grad_RO: Tensor, x_RI: Tensor, ends_E: Tensor) -> Tensor:
    return x_RI.new_empty(ends_E.shape[0], grad_RO.shape[1], x_RI.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad_RO: Tensor) -> tuple[Tensor, Tensor, None]:
    x_RI, w_EOI, ends_E = ctx.saved_tensors
    grad_x_RI = _exact_product(grad_RO, w_EOI.transpose(1, 2), ends_E)
    return grad_x_RI, _exact_gradient(grad_RO, x_RI, ends_E), None


_exact_product.register_autograd(_differentiate, setup_context=_keep)

# Operators whose results are expensive to compute again.
EXPERT_PRODUCTS: tuple[Any, ...] = (grouped_product, torch.ops.regrow.exact_grouped_product.default)
