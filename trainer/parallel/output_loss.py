"""Output layer and cross-entropy in one: some rows at a time, so that the logits are never there as a whole.

Gradients are made in the forward pass, while a chunk's logits are there; the backward pass only scales them. The idea
is that of Liger (arXiv:2410.10989, section 3.2); this one knows vocabularies that ranks share, labels that do not
count, z-loss, and the CPU's own products.

Shapes: B batch, T positions, D model width, S = B·T rows, R rows of a chunk, V vocabulary, or this rank's part of it.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from regrow.models.cpu import Kind, is_used, outer, product
from regrow.models.linear import Linear
from regrow.torch_compat import has_hooks
from regrow.trainer.loss import RowLosses, in_wide_type, row_losses, summed_cross_entropy
from regrow.trainer.loss_kernels import LossKernels
from regrow.trainer.parallel.tensor import SplitOutput
from regrow.trainer.parallel.vocabulary import VocabularyShard

__all__ = ["ChunkedLoss", "TrainingLoss", "chunk_rows", "output_operands"]

# Rows of a chunk: at least so many, which keep the products fast (each chunk reads the weight twice and adds to its
# gradient), and more while the logits have no more elements than these.
_CPU_ROWS, _CPU_ELEMENTS = 512, 1 << 21
_ROWS, _ELEMENTS = 4096, 1 << 26


def chunk_rows(rows: int, vocabulary: int, device_type: str) -> int:
    """Rows of a chunk, all of which but the last are of this size.

    Args:
        rows: in all.
        vocabulary: tokens of the largest part of the vocabulary: ranks that share it go in step.
        device_type: where it is computed.
    """
    least, elements = (_CPU_ROWS, _CPU_ELEMENTS) if device_type == "cpu" else (_ROWS, _ELEMENTS)
    most = max(least, elements // max(1, vocabulary))
    chunks = max(1, -(-rows // most))
    return max(1, -(-rows // chunks))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Options:
    """What is the same for all rows.

    Attributes:
        shard: see `row_losses`.
        z_loss: likewise.
        rows: of a chunk; None takes `chunk_rows`.
        splits_backward: whether the backward pass runs in two halves, the first for the hidden states.
        seen: told of each row's loss, float64 `(S,)`, without a gradient.
        kernels: see `row_losses`.
    """

    shard: VocabularyShard | None
    z_loss: float
    rows: int | None
    splits_backward: bool
    seen: RowLosses | None
    kernels: LossKernels | None


@final
class _Products:
    """The three products of a chunk, each by the kernel that was chosen for the whole layer.

    Args:
        hidden_SD: of all chunks.
        weight_VD: the output layer's, in the dtype of the hidden states.
    """

    def __init__(self, hidden_SD: Tensor, weight_VD: Tensor) -> None:
        self._weight_VD = weight_VD
        self._onednn = is_used(Kind.product, (len(hidden_SD), *weight_VD.t().shape), hidden_SD, weight_VD)
        self._space_RV: Tensor | None = None

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """What the chunk before was given is lost."""
        if self._onednn:
            return product(hidden_RD, self._weight_VD)
        if self._space_RV is None or len(self._space_RV) < len(hidden_RD):
            self._space_RV = hidden_RD.new_empty(len(hidden_RD), len(self._weight_VD))
        return torch.mm(hidden_RD, self._weight_VD.t(), out=self._space_RV[: len(hidden_RD)])

    def grad_hidden(self, grad_RV: Tensor, out_RD: Tensor) -> None:
        """The gradient of some rows."""
        if self._onednn:
            out_RD.copy_(product(grad_RV, self._weight_VD.t()))
        else:
            torch.mm(grad_RV, self._weight_VD, out=out_RD)

    def add_grad_weight(self, total_VD: Tensor | None, grad_RV: Tensor, hidden_RD: Tensor) -> Tensor:
        """Adds some rows' part, in float32 or better."""
        if self._onednn:
            part_VD = outer(grad_RV, hidden_RD)
            return part_VD if total_VD is None else total_VD.add_(part_VD)
        return _multiply_add(total_VD, grad_RV.t(), hidden_RD)


def _multiply_add(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """The product of two matrices, added to what there is; the sum is float32 or better whatever they are."""
    exact = torch.promote_types(left.dtype, torch.float32)
    if left.dtype == exact:
        return torch.mm(left, right) if total is None else total.addmm_(left, right)
    if left.device.type == "cuda":
        # The product is not rounded on its way.
        if total is None:
            return torch.mm(left, right, out_dtype=exact)
        return torch.addmm(total, left, right, out_dtype=exact, out=total)
    product_of_both = torch.mm(left, right)
    return product_of_both.to(exact) if total is None else total.add_(product_of_both)


def _scaled(x: Tensor, factor: Tensor, *, in_place: bool) -> Tensor:
    wide = in_wide_type(factor, x.dtype)
    return x.mul_(wide) if in_place else torch.mul(x, wide).to(x.dtype)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_SD: Tensor, weight_VD: Tensor, labels_S: Tensor, options: _Options) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_SD = torch.empty_like(hidden_SD) if wants_hidden else None
        grad_VD: Tensor | None = None
        losses_S = torch.empty(len(hidden_SD), dtype=torch.float64, device=hidden_SD.device)
        products = _Products(hidden_SD, weight_VD.to(hidden_SD.dtype))
        for part in _chunks(hidden_SD, weight_VD, options):
            logits_RV = products.logits(hidden_SD[part])
            grad_RV = logits_RV if wants_hidden or wants_weight else None
            losses_S[part] = row_losses(
                logits_RV, labels_S[part], grad_RV, options.shard, options.z_loss, options.kernels
            )
            if grad_SD is not None:
                products.grad_hidden(logits_RV, grad_SD[part])
            if wants_weight:
                grad_VD = products.add_grad_weight(grad_VD, logits_RV, hidden_SD[part])
            # One chunk is gone before the next is there.
            del logits_RV, grad_RV
        if wants_weight and grad_VD is None:
            grad_VD = torch.zeros_like(weight_VD)
        # Not as saved tensors: nobody else may hold them, so that the gradient of the weight need not be copied.
        if options.seen is not None:
            options.seen(losses_S)
        ctx.grads, ctx.dtype, ctx.twice = (grad_SD, grad_VD), weight_VD.dtype, options.splits_backward
        return losses_S.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        if ctx.grads is None:
            raise RuntimeError("the loss was gone through backward a second time; its gradients are made once")
        grads = ctx.grads
        if not ctx.twice:
            ctx.grads = None
        # Each half of a backward pass in two asks for both.
        grad_SD, grad_VD = (None if g is None else _scaled(g, grad, in_place=not ctx.twice) for g in grads)
        return grad_SD, None if grad_VD is None else grad_VD.to(ctx.dtype), None, None


def _chunks(hidden_SD: Tensor, weight_VD: Tensor, options: _Options) -> Iterator[slice]:
    rows = len(hidden_SD)
    largest = len(weight_VD) if options.shard is None else options.shard.largest
    size = options.rows or chunk_rows(rows, largest, hidden_SD.device.type)
    yield from (slice(start, min(start + size, rows)) for start in range(0, rows, size))


@final
class ChunkedLoss:
    """Called by a model in place of its output layer, with what that would be given.

    Beside the gradients of hidden states `(S, D)` and weight `(V, D)`, of which the second is float32 or better, it
    holds one chunk of logits and one block of that in float32 or better: at most max(512 · V, 2^21) elements and
    2^18 on a CPU, max(4,096 · V, 2^26) and 2^26 on an accelerator (by compiled kernels no block). A copy of the
    weight comes to that where the hidden states have another dtype, and a chunk's part of the weight's gradient on a
    CPU in bfloat16 or by oneDNN. Without gradients there are the chunk and the block alone.

    A row's loss and its hidden state's gradient depend on that row alone, so on the size of chunks only as far as a
    product's rounding depends on the number of its rows (on CPUs here not at all, from 16 rows on). The weight's
    gradient is a sum over chunks in float32 or better: its rounding differs, by up to 1e-6 of its norm in float32,
    1e-15 in float64 and 5e-3 in bfloat16.

    An output layer that computes otherwise than `Linear` does, or that somebody has hooked, is asked for its logits.

    Args:
        labels_BT: int64, over the whole vocabulary.
        shard: this rank's part of the vocabulary, None where that is whole.
        z_loss: see `row_losses`.
        splits_backward: whether the backward pass runs in two halves.
        rows: of a chunk; None takes `chunk_rows`.
        seen: told of each row's loss.
        kernels: see `row_losses`.
    """

    def __init__(
        self,
        labels_BT: Tensor,
        *,
        shard: VocabularyShard | None = None,
        z_loss: float = 0.0,
        splits_backward: bool = False,
        rows: int | None = None,
        seen: RowLosses | None = None,
        kernels: LossKernels | None = None,
    ) -> None:
        self._labels_BT = labels_BT
        self._options = _Options(
            shard=shard, z_loss=z_loss, rows=rows, splits_backward=splits_backward, seen=seen, kernels=kernels
        )

    def __call__(self, hidden_BTD: Tensor, output: nn.Module) -> Tensor:
        """The summed loss, a float64 scalar."""
        operands = output_operands(output, hidden_BTD)
        if operands is None:
            o = self._options
            return summed_cross_entropy(
                output(hidden_BTD), self._labels_BT, shard=o.shard, z_loss=o.z_loss, seen=o.seen, kernels=o.kernels
            )
        hidden, weight = operands if torch.is_grad_enabled() else (t.detach() for t in operands)
        total: Tensor = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
            hidden.flatten(0, -2), weight, self._labels_BT.flatten(), self._options
        )
        return total


def output_operands(output: nn.Module, hidden_BTD: Tensor) -> tuple[Tensor, Tensor] | None:
    """What the output layer multiplies; None where it does more, or something else."""
    if has_hooks(output) or "forward" in vars(output):
        return None
    if isinstance(output, SplitOutput):
        return output.operands(hidden_BTD)
    if isinstance(output, Linear) and type(output).forward is Linear.forward:
        return hidden_BTD, output.weight
    return None


@final
class TrainingLoss:
    """The loss as an engine asks for it: without the logits from models that offer that, from the logits of others.

    Args:
        model: whose last layer is the output; the class decides.
        shard: this rank's part of the vocabulary, None where that is whole.
        z_loss: see `row_losses`.
        splits_backward: whether the backward pass runs in two halves.
        kernels: see `row_losses`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        shard: VocabularyShard | None,
        z_loss: float,
        splits_backward: bool,
        kernels: LossKernels | None = None,
    ) -> None:
        self._shard, self._z_loss, self._splits_backward = shard, z_loss, splits_backward
        self._kernels = kernels
        self.in_model = "output_loss" in inspect.signature(model.forward).parameters

    def options(self, labels_BT: Tensor, seen: RowLosses | None = None) -> dict[str, Any]:
        """What the model's forward pass is given beside its inputs.

        Args:
            labels_BT: see `ChunkedLoss`, as of `seen`.
            seen: told of each row's loss.
        """
        if not self.in_model:
            return {}
        return {
            "output_loss": ChunkedLoss(
                labels_BT,
                shard=self._shard,
                z_loss=self._z_loss,
                splits_backward=self._splits_backward,
                seen=seen,
                kernels=self._kernels,
            )
        }

    def of(self, result: Tensor, labels_BT: Tensor, seen: RowLosses | None = None) -> Tensor:
        """The summed loss, a float64 scalar, from what the model returned for these options."""
        if self.in_model:
            return result
        return summed_cross_entropy(
            result, labels_BT, shard=self._shard, z_loss=self._z_loss, seen=seen, kernels=self._kernels
        )

    def result_of(self, logits_shape: tuple[int, ...], dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of what the model returns, whose logits have these."""
        return ((), torch.float64) if self.in_model else (logits_shape, dtype)
