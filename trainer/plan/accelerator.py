"""What a step's operators keep on a GPU, where a dry run has a CPU's operators."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["accelerator_kernels", "imagined_grouped_product"]


class _FusedNorm(torch.autograd.Function):
    """RMSNorm as a GPU's kernel has it: its input and a number per row are kept. Shapes alone are computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_D, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight_D, _ = ctx.saved_tensors
        return torch.empty_like(grad, dtype=x.dtype), torch.empty_like(weight_D)


def _norm(x: Tensor, _shape: Any, weight: Tensor, _eps: float) -> Tensor:
    out: Tensor = _FusedNorm.apply(x, weight)  # type: ignore[no-untyped-call]
    return out


class _GroupedProduct(torch.autograd.Function):
    """A product of rows with the matrix of their group, which keeps both; shapes alone."""

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, w_EIO: Tensor) -> Tensor:
        ctx.save_for_backward(x_RI, w_EIO)
        return x_RI.new_empty(x_RI.shape[0], w_EIO.shape[2])

    @staticmethod
    def backward(ctx: Any, _grad_RO: Tensor) -> tuple[Tensor, Tensor]:
        x_RI, w_EIO = ctx.saved_tensors
        return torch.empty_like(x_RI), torch.empty_like(w_EIO)


@contextmanager
def imagined_grouped_product() -> Iterator[None]:
    """Within it, grouped products have shapes in every dtype; torch's own know bfloat16 alone without values."""
    product = F.grouped_mm

    def imagined(x_RI: Tensor, w_EIO: Tensor, *, offs: Tensor) -> Tensor:
        if x_RI.dtype is torch.bfloat16:
            out: Tensor = product(x_RI, w_EIO, offs=offs)
        else:
            out = _GroupedProduct.apply(x_RI, w_EIO)  # type: ignore[no-untyped-call]
        return out

    F.grouped_mm = imagined  # type: ignore[assignment]
    try:
        yield
    finally:
        F.grouped_mm = product


@contextmanager
def accelerator_kernels(*, compiled: bool) -> Iterator[None]:
    """Within it, operators keep for the backward pass what a GPU's keep; for one thread at a time.

    Args:
        compiled: whether blocks are: the compiler then computes an activation function's result again rather than
            keep it. (It keeps the other results, as measured on an H100.)
    """
    made_of: weakref.WeakKeyDictionary[torch.UntypedStorage, Tensor] = weakref.WeakKeyDictionary()
    norm, silu = F.rms_norm, F.silu

    def remembered(x: Tensor) -> Tensor:
        out = silu(x)
        made_of[out.untyped_storage()] = x.detach()
        return out

    def pack(tensor: Tensor) -> Any:
        source = made_of.get(tensor.untyped_storage())
        return tensor if source is None else (source, tensor.shape)

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else silu(packed[0]).view(packed[1])

    # Recomputed blocks call them again in the backward pass, where torch's own modes do not reach.
    F.rms_norm, F.silu = _norm, remembered if compiled else silu  # type: ignore[assignment]
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, unpack) if compiled else nullcontext()
    try:
        with hooks:
            yield
    finally:
        F.rms_norm, F.silu = norm, silu
