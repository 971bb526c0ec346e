"""The training loss: cross-entropy of logits, and its gradient, some rows at a time.

Shapes: B batch, T positions, S = B·T rows, R some of the rows, V vocabulary, or this rank's part of it.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from regrow.trainer.data.windows import IGNORE
from regrow.trainer.loss_kernels import LossKernels
from regrow.trainer.parallel.vocabulary import VocabularyShard

__all__ = ["RowLosses", "in_wide_type", "row_losses", "summed_cross_entropy"]

# Told of the loss of each row, float64 `(S,)`, where it is computed.
RowLosses = Callable[[Tensor], None]
# Elements of logits that are float32 at a time: on a CPU they stay in its cache.
_CPU_ELEMENTS, _ELEMENTS = 1 << 18, 1 << 26


def row_losses(
    logits_RV: Tensor,
    labels_R: Tensor,
    grad_RV: Tensor | None,
    shard: VocabularyShard | None,
    z_loss: float,
    kernels: LossKernels | None = None,
) -> Tensor:
    """Cross-entropy in nats of each row, 0 where the label does not count.

    Returns float64 `(R,)`, from terms in float32 or better, each from its row alone. Beside `grad_RV` it holds a
    block of at most 2^18 elements, or one row (2^26 on an accelerator), in float32 or better; compiled kernels hold
    no block.

    Args:
        logits_RV: this rank's part of the vocabulary.
        labels_R: int64, over the whole vocabulary.
        grad_RV: filled with the gradient of the losses' sum, of the logits' shape and dtype; may be `logits_RV`
            itself, which is then lost. None computes no gradient.
        shard: where the logits lie in the vocabulary that ranks share; None if they are all.
        z_loss: the gradient is that of the losses and of this times the squared logarithm of each row's sum of
            exponents (PaLM, arXiv:2204.02311, section 5), which the losses leave out.
        kernels: go through all rows at once; None: operators, some rows at a time.
    """
    counts_R1 = (labels_R != IGNORE)[:, None]
    if kernels is not None and logits_RV.numel() > 0:
        return _losses_by_kernels(logits_RV, labels_R[:, None], counts_R1, grad_RV, shard, z_loss, kernels)[:, 0]
    if shard is not None:
        return _shared_losses(logits_RV, labels_R[:, None], counts_R1, grad_RV, shard, z_loss)[:, 0]
    losses_R1 = torch.empty(counts_R1.shape, dtype=torch.float64, device=logits_RV.device)
    labels_R1 = labels_R[:, None].where(counts_R1, 0)
    for part in _blocks(logits_RV):
        # In a function, so that one block is gone before the next is there.
        grad = None if grad_RV is None else grad_RV[part]
        losses_R1[part] = _block_losses(logits_RV[part], labels_R1[part], counts_R1[part], grad, z_loss)
    return losses_R1[:, 0]


def _block_losses(
    logits_RV: Tensor, labels_R1: Tensor, counts_R1: Tensor, grad_RV: Tensor | None, z_loss: float
) -> Tensor:
    highest_R1 = logits_RV.amax(-1, keepdim=True)
    # In one pass: a copy in the wider type would be a second block.
    weights_RV = torch.sub(logits_RV, _exact(highest_R1))
    targets_R1 = weights_RV.gather(1, labels_R1)
    # Summed by pairs, which `log_softmax` does not: over a large vocabulary it is off by parts in a million.
    sums_R1 = weights_RV.exp_().sum(-1, keepdim=True)
    logs_R1 = sums_R1.to(torch.float64).log()
    if grad_RV is not None:
        more_R1 = None if z_loss == 0 else 1 + 2 * z_loss * (logs_R1 + highest_R1)
        _write_gradient(grad_RV, weights_RV, sums_R1, labels_R1, counts_R1, counts_R1, more_R1)
    return (logs_R1 - targets_R1).where(counts_R1, 0.0)


def _shared_losses(
    logits_RV: Tensor,
    labels_R1: Tensor,
    counts_R1: Tensor,
    grad_RV: Tensor | None,
    shard: VocabularyShard,
    z_loss: float,
) -> Tensor:
    """The same over a vocabulary that ranks share: each block is gone through twice, the ranks agree in between."""
    here_R1 = shard.holds(labels_R1) & counts_R1
    labels_R1 = (labels_R1 - shard.first).where(here_R1, 0)
    empty_R1 = _exact(logits_RV[:, :0]).new_empty(counts_R1.shape)
    highest_R1, sums_R1 = torch.full_like(empty_R1, -torch.inf), torch.zeros_like(empty_R1)
    targets_R1 = torch.zeros_like(empty_R1)
    # Where the logits are exact, their exponents fit where the gradient goes.
    kept_RV = grad_RV if grad_RV is not None and grad_RV.dtype == empty_R1.dtype else None
    for part in _blocks(logits_RV):
        targets_R1[part] = logits_RV[part].gather(1, labels_R1[part]).to(empty_R1.dtype).where(here_R1[part], 0.0)
        highest_R1[part] = logits_RV[part].amax(-1, keepdim=True)
        sums_R1[part] = _exponents(logits_RV, highest_R1, part, kept_RV).sum(-1, keepdim=True)
    logs_R1, target_R1, totals_R1 = shard.join(highest_R1, sums_R1, targets_R1)
    if grad_RV is not None:
        for part in _blocks(logits_RV):
            more_R1 = None if z_loss == 0 else 1 + 2 * z_loss * logs_R1[part]
            _write_gradient(
                grad_RV[part],
                kept_RV[part] if kept_RV is not None else _exponents(logits_RV, highest_R1, part, None),
                totals_R1[part],
                labels_R1[part],
                here_R1[part],
                counts_R1[part],
                more_R1,
            )
    return (logs_R1 - target_R1).where(counts_R1, 0.0)


def _losses_by_kernels(
    logits_RV: Tensor,
    labels_R1: Tensor,
    counts_R1: Tensor,
    grad_RV: Tensor | None,
    shard: VocabularyShard | None,
    z_loss: float,
    kernels: LossKernels,
) -> Tensor:
    here_R1 = counts_R1 if shard is None else shard.holds(labels_R1) & counts_R1
    labels_R1 = (labels_R1 if shard is None else labels_R1 - shard.first).where(here_R1, 0)
    # A compiler looks at what has a graph, which is not asked for here; one tensor stays one.
    logits_RV = logits_RV if logits_RV is grad_RV else logits_RV.detach()
    highest_R1, sums_R1, targets_R1 = kernels.statistics(logits_RV, labels_R1)
    if shard is None:
        logs_R1, target_R1, totals_R1 = sums_R1.to(torch.float64).log() + highest_R1, targets_R1, sums_R1
    else:
        logs_R1, target_R1, totals_R1 = shard.join(highest_R1, sums_R1, targets_R1.where(here_R1, 0.0))
    if grad_RV is not None:
        more_R1 = None if z_loss == 0 else 1 + 2 * z_loss * logs_R1
        kernels.gradient(grad_RV, logits_RV, highest_R1, totals_R1, labels_R1, here_R1, counts_R1, more_R1)
    return (logs_R1 - target_R1).where(counts_R1, 0.0)


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _blocks(logits_RV: Tensor) -> Iterator[slice]:
    """Rows that are gone through at a time; none where there is no vocabulary."""
    count, width = logits_RV.shape
    if width > 0:
        rows = max(1, (_CPU_ELEMENTS if logits_RV.device.type == "cpu" else _ELEMENTS) // width)
        yield from (slice(start, start + rows) for start in range(0, count, rows))


def _exponents(logits_RV: Tensor, highest_R1: Tensor, part: slice, out_RV: Tensor | None) -> Tensor:
    out = None if out_RV is None else out_RV[part]
    return torch.sub(logits_RV[part], highest_R1[part], out=out).exp_()


def _write_gradient(
    out_RV: Tensor,
    weights_RV: Tensor,
    totals_R1: Tensor,
    labels_R1: Tensor,
    here_R1: Tensor,
    counts_R1: Tensor,
    more_R1: Tensor | None,
) -> None:
    """Shares of the exponents `weights_RV`, less one at the labels that are `here_R1`; changes `weights_RV`."""
    if more_R1 is not None:
        weights_RV.mul_(more_R1)
    weights_RV.scatter_add_(1, labels_R1, -totals_R1.where(here_R1, 0.0))
    torch.mul(weights_RV, counts_R1 / totals_R1, out=out_RV)


def in_wide_type(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of a sum as a factor of gradients of a type: a scalar would be rounded to theirs, bfloat16 say."""
    return grad.to(torch.promote_types(dtype, torch.float32)).view(1)


class _SummedCrossEntropy(torch.autograd.Function):
    """Makes the gradient in the forward pass, in the logits' dtype, and keeps it alone."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_SV: Tensor,
        labels_S: Tensor,
        shard: VocabularyShard | None,
        z_loss: float,
        seen: RowLosses | None,
        kernels: LossKernels | None,
    ) -> Tensor:
        grad_SV = torch.empty_like(logits_SV) if ctx.needs_input_grad[0] else None
        losses_S = row_losses(logits_SV, labels_S, grad_SV, shard, z_loss, kernels)
        if seen is not None:
            seen(losses_S)
        ctx.save_for_backward(grad_SV)
        return losses_S.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None, None]:
        (grad_SV,) = ctx.saved_tensors
        # In place: a second backward pass is then refused by autograd, as it is where a graph is gone.
        return grad_SV.mul_(in_wide_type(grad, grad_SV.dtype)), None, None, None, None, None


def summed_cross_entropy(
    logits_BTV: Tensor,
    labels_BT: Tensor,
    *,
    shard: VocabularyShard | None = None,
    z_loss: float = 0.0,
    seen: RowLosses | None = None,
    kernels: LossKernels | None = None,
) -> Tensor:
    """Cross-entropy in nats, summed over the labels that count; a float64 scalar of terms in float32 or better.

    Args:
        logits_BTV: this rank's part of the vocabulary.
        labels_BT: int64, over the whole vocabulary.
        shard: see `row_losses`, as of `z_loss`.
        z_loss: what the gradient holds beside that of the sum returned.
        seen: told of each row's loss.
        kernels: see `row_losses`.
    """
    total: Tensor = _SummedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        logits_BTV.flatten(0, 1), labels_BT.flatten(), shard, z_loss, seen, kernels
    )
    return total
