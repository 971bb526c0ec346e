"""Ring attention (Liu et al. 2023, arXiv:2310.01889): keys and values travel from rank to rank, no rank has them all.

Each rank attends with its queries to one part of the keys at a time, while the next part is on its way, and merges
what it finds by the logarithm of the sum of exponents (as FlashAttention does, Dao et al. 2022, arXiv:2205.14135). In
the backward pass the gradients of keys and values travel along, and are back after a round.

With balance a rank holds a chunk from the front of the sequence and one from its back: of a rank before it only the
front chunk is visible, and of a rank behind it only its own back chunk sees anything. Every step is then half of the
work.

Shapes: B batch, T positions of a rank, S positions of the sequence, N query heads, K key/value heads, H head width;
I query and J key positions of a block.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regrow.torch_compat import (
    cpu_attention,
    cpu_attention_backward,
    efficient_attention,
    efficient_attention_backward,
    flash_attention,
    flash_attention_backward,
)
from regrow.trainer.parallel.collectives import ring_send_recv_start, ring_send_recv_wait
from regrow.trainer.parallel.sequence_chunks import positions_of

__all__ = ["block_attention", "block_gradients", "ring_attention"]


def block_attention(
    q_BNIH: Tensor, k_BNJH: Tensor, v_BNJH: Tensor, mask: Tensor | None, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention to some of the keys: `(B, N, I, H)`, and the logarithm of the sum of exponents, `(B, N, I)`.

    Args:
        q_BNIH: queries.
        k_BNJH: keys.
        v_BNJH: values.
        mask: boolean, true where a query sees a key, `(B, 1, I, J)`; a row may see nothing.
        causal: without a mask, whether position i sees up to position i alone (I = J).
    """
    bias = _bias(q_BNIH, k_BNJH, mask)
    if q_BNIH.device.type == "cpu":
        out, lse = cpu_attention(q_BNIH, k_BNJH, v_BNJH, 0.0, causal, attn_mask=bias)
    elif _flash(q_BNIH, mask):
        out, lse, *_ = flash_attention(q_BNIH, k_BNJH, v_BNJH, 0.0, causal)
    else:
        out, lse, *_ = efficient_attention(q_BNIH, k_BNJH, v_BNJH, bias, True, 0.0, causal)
        lse = lse[..., : q_BNIH.shape[2]]
    if mask is not None:
        # What the kernels give for a row that sees nothing differs.
        sees = mask.any(-1)
        out = torch.where(sees[..., None], out, 0.0)
        lse = torch.where(sees, lse, -torch.inf)
    return out, lse


def block_gradients(
    grad_BNIH: Tensor,
    q_BNIH: Tensor,
    k_BNJH: Tensor,
    v_BNJH: Tensor,
    out_BNIH: Tensor,
    lse_BNI: Tensor,
    mask: Tensor | None,
    *,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """This block's part of the gradients of queries, keys and values.

    Args:
        grad_BNIH: of the attention to all keys.
        q_BNIH: queries.
        k_BNJH: keys of the block.
        v_BNJH: values of the block.
        out_BNIH: the attention to all keys.
        lse_BNI: over all keys.
        mask: as in the forward pass.
        causal: likewise.
    """
    bias = _bias(q_BNIH, k_BNJH, mask)
    if q_BNIH.device.type == "cpu":
        grads = cpu_attention_backward(
            grad_BNIH, q_BNIH, k_BNJH, v_BNJH, out_BNIH, lse_BNI, 0.0, causal, attn_mask=bias
        )
        return grads[0], grads[1], grads[2]
    # Without dropout the kernels take no random numbers.
    none = torch.empty((), dtype=torch.uint64, device=q_BNIH.device)
    if _flash(q_BNIH, mask):
        longest = (q_BNIH.shape[2], k_BNJH.shape[2])
        grads = flash_attention_backward(
            grad_BNIH, q_BNIH, k_BNJH, v_BNJH, out_BNIH, lse_BNI, None, None, *longest, 0.0, causal, none, none
        )
        return grads[0], grads[1], grads[2]
    padded = F.pad(lse_BNI, (0, -lse_BNI.shape[2] % 32))
    needed = [True, True, True, False]
    seed = torch.empty((), dtype=torch.int64, device=q_BNIH.device)
    grads = efficient_attention_backward(
        grad_BNIH, q_BNIH, k_BNJH, v_BNJH, bias, out_BNIH, padded, seed, seed, 0.0, needed, causal
    )
    return grads[0], grads[1], grads[2]


def _flash(q: Tensor, mask: Tensor | None) -> bool:
    """Whether the fastest kernel of a GPU takes it."""
    return mask is None and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def _bias(q_BNIH: Tensor, k_BNJH: Tensor, mask: Tensor | None) -> Tensor | None:
    """What is added to the scores: 0 and minus infinity."""
    if mask is None:
        return None
    zero = torch.zeros((), dtype=q_BNIH.dtype, device=q_BNIH.device)
    bias = torch.where(mask, zero, -torch.inf)
    if q_BNIH.device.type == "cpu":
        return bias
    # GPU kernels read rows from aligned addresses.
    keys = k_BNJH.shape[2]
    aligned = F.pad(bias, (0, -keys % 16))[..., :keys]
    return aligned.expand(q_BNIH.shape[0], q_BNIH.shape[1], -1, -1)


@dataclass(frozen=True, slots=True)
class _VisibleRange:
    """What a rank's queries see of another rank's keys.

    Attributes:
        queries: from where on, of the rank's T positions.
        keys: up to where, of the other's.
        causal: whether it is the rank's own part, where position i sees up to position i.
    """

    queries: int
    keys: int
    causal: bool


def _visible_range(rank: int, source: int, length: int, *, balance: bool) -> _VisibleRange | None:
    """What is seen of the keys of `source`; None where it is nothing."""
    if source == rank:
        return _VisibleRange(0, length, causal=True)
    if source < rank:
        return _VisibleRange(0, length // 2 if balance else length, causal=False)
    return _VisibleRange(length // 2, length, causal=False) if balance else None


def _mask_of(
    first_BS: Tensor | None, rank: int, source: int, ranks: int, visible: _VisibleRange, *, balance: bool
) -> Tensor | None:
    """What a rank's queries see of another's keys, bool `(B, 1, I, J)`, by what each position sees first."""
    if first_BS is None:
        return None
    length, device = first_BS.shape[1], first_BS.device
    rows_I = positions_of(rank, ranks, length, balance=balance, device=device)[visible.queries :]
    keys_J = positions_of(source, ranks, length, balance=balance, device=device)[: visible.keys]
    return ((keys_J >= first_BS[:, rows_I, None]) & (keys_J <= rows_I[:, None]))[:, None]


def _widen(x_BKTH: Tensor, groups: int) -> Tensor:
    """Keys or values for each query head."""
    return x_BKTH.repeat_interleave(groups, dim=1) if groups > 1 else x_BKTH


def _narrow(grad_BNTH: Tensor, groups: int) -> Tensor:
    batch, heads, *rest = grad_BNTH.shape
    return grad_BNTH.view(batch, heads // groups, groups, *rest).sum(2) if groups > 1 else grad_BNTH


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BNTH: Tensor,
        k_BKTH: Tensor,
        v_BKTH: Tensor,
        first: Tensor | None,
        rank: int,
        ranks: int,
        balance: bool,
        group: str,
    ) -> Tensor:
        length, groups = q_BNTH.shape[2], q_BNTH.shape[1] // k_BKTH.shape[1]
        wide = torch.float64 if q_BNTH.dtype == torch.float64 else torch.float32
        out = torch.zeros_like(q_BNTH, dtype=wide)
        lse = torch.full(q_BNTH.shape[:3], -torch.inf, dtype=wide, device=q_BNTH.device)
        travelling = torch.stack([k_BKTH, v_BKTH])
        for step in range(ranks):
            source = (rank - step) % ranks
            visible = _visible_range(rank, source, length, balance=balance)
            coming = None if step == ranks - 1 else ring_send_recv_start(travelling, rank, ranks, group)
            if visible is not None:
                k, v = (_widen(x[:, :, : visible.keys], groups) for x in travelling.unbind())
                seen = _mask_of(first, rank, source, ranks, visible, balance=balance)
                causal = visible.causal and first is None
                found, found_lse = block_attention(q_BNTH[:, :, visible.queries :], k, v, seen, causal=causal)
                out, lse = _merged(out, lse, found, found_lse)
            if coming is not None:
                travelling = ring_send_recv_wait(coming, travelling)
        # A `to` that changes nothing is another name of the same tensor, whose gradient torch 2.11's compiler loses.
        result = out if out.dtype == q_BNTH.dtype else out.to(q_BNTH.dtype)
        ctx.save_for_backward(q_BNTH, k_BKTH, v_BKTH, first, result, lse)
        ctx.ring = (rank, ranks, balance, group)
        return result

    @staticmethod
    def backward(ctx: Any, grad_BNTH: Tensor) -> tuple[Tensor | None, ...]:
        q, k_BKTH, v_BKTH, first, out, lse = ctx.saved_tensors
        rank, ranks, balance, group = ctx.ring
        length, groups = q.shape[2], q.shape[1] // k_BKTH.shape[1]
        grad_q = torch.zeros_like(q, dtype=lse.dtype)
        travelling = torch.stack([k_BKTH, v_BKTH])
        # The sums of their gradients follow these around, and are sent while the next block is computed.
        sums = torch.zeros_like(travelling, dtype=lse.dtype)
        on_the_way = None
        for step in range(ranks):
            source = (rank - step) % ranks
            visible = _visible_range(rank, source, length, balance=balance)
            coming = None if step == ranks - 1 else ring_send_recv_start(travelling, rank, ranks, group)
            block = None
            if visible is not None:
                k, v = (_widen(x[:, :, : visible.keys], groups) for x in travelling.unbind())
                seen = _mask_of(first, rank, source, ranks, visible, balance=balance)
                mine = [x[:, :, visible.queries :].contiguous() for x in (grad_BNTH, q, out, lse)]
                causal = visible.causal and first is None
                block = block_gradients(mine[0], mine[1], k, v, mine[2], mine[3], seen, causal=causal)
            if on_the_way is not None:
                sums = ring_send_recv_wait(on_the_way, sums)
            if block is not None and visible is not None:
                grad_q = grad_q + F.pad(block[0].to(lse.dtype), (0, 0, visible.queries, 0))
                mine_KV = torch.stack([_narrow(part.to(lse.dtype), groups) for part in block[1:]])
                sums = sums + F.pad(mine_KV, (0, 0, 0, length - visible.keys))
            on_the_way = ring_send_recv_start(sums, rank, ranks, group)
            if coming is not None:
                travelling = ring_send_recv_wait(coming, travelling)
        if on_the_way is not None:
            sums = ring_send_recv_wait(on_the_way, sums)
        grads = (grad_q.to(q.dtype), sums[0].to(q.dtype), sums[1].to(q.dtype))
        return (*grads, None, None, None, None, None)


def _merged(out: Tensor, lse: Tensor, found: Tensor, found_lse: Tensor) -> tuple[Tensor, Tensor]:
    """What was found before with a block for its last positions; nothing is changed in place, for the compiler."""
    missing = lse.shape[2] - found_lse.shape[2]
    found, found_lse = (
        F.pad(found.to(out.dtype), (0, 0, missing, 0)),
        F.pad(found_lse, (missing, 0), value=-torch.inf),
    )
    both = torch.logaddexp(lse, found_lse.to(lse.dtype))
    # Before the first block, both may be minus infinity.
    before, new = ((x - both).exp().nan_to_num(0.0)[..., None] for x in (lse, found_lse))
    return out * before + found * new, both


def ring_attention(
    q_BTNH: Tensor,
    k_BTKH: Tensor,
    v_BTKH: Tensor,
    first_BS: Tensor | None,
    *,
    rank: int,
    ranks: int,
    balance: bool,
    group: str,
) -> Tensor:
    """Causal attention of a rank's positions to the whole sequence, `(B, T, N, H)`.

    Args:
        q_BTNH: this rank's queries.
        k_BTKH: this rank's keys.
        v_BTKH: this rank's values.
        first_BS: int32, the first key that each position of the sequence sees; None is the first of all.
        rank: this one's number in the ring.
        ranks: how many there are.
        balance: whether a rank holds two chunks of the sequence.
        group: the name of the ranks' group.
    """
    heads = (x.transpose(1, 2).contiguous() for x in (q_BTNH, k_BTKH, v_BTKH))
    out: Tensor = _Ring.apply(*heads, first_BS, rank, ranks, balance, group)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2)
