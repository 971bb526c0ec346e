"""float32 products with a weight by oneDNN, where torch takes MKL."""

from typing import Any

import torch
from torch import Tensor

from regrow.torch_compat import onednn_linear, view_of_nothing_else

__all__ = ["HAS_ONEDNN", "PRODUCTS", "linear", "outer", "product"]


def _onednn() -> Any:
    """oneDNN's product of plain tensors, None where this torch has none or the CPU is not an x86 with AVX."""
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not available or not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return None
    return onednn_linear()


# MKL keeps to AVX2 on AMD's CPUs, at half of oneDNN's rate on those that have AVX-512.
_ONEDNN = _onednn()
HAS_ONEDNN = _ONEDNN is not None
# Operators beside torch's own that multiply here.
PRODUCTS = () if _ONEDNN is None else (_ONEDNN.default,)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T`, unseen by autograd, where `HAS_ONEDNN`; `weight` is a matrix, `x` may have more dimensions."""
    rows = _ONEDNN(x.flatten(0, -2), weight, None, "none", [], "")
    # As `matmul` does: the matrix is used nowhere else, so that autograd need not know the result as a view.
    out: Tensor = view_of_nothing_else(rows, [*x.shape[:-1], weight.shape[0]])
    return out


def outer(grad: Tensor, x: Tensor) -> Tensor:
    """`grad.T @ x`, the gradient of a weight, likewise."""
    # oneDNN's left side is copied to be contiguous: better the narrower of the two.
    return product(grad.t(), x.t()) if grad.shape[1] <= x.shape[1] else product(x.t(), grad.t()).t()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x = product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        grad_w = outer(grad.flatten(0, -2), x.flatten(0, -2)) if ctx.needs_input_grad[1] else None
        return grad_x, grad_w


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T`, both float32, where `HAS_ONEDNN`."""
    out: Tensor = _Linear.apply(x, weight)  # type: ignore[no-untyped-call]
    return out
