"""Context parallelism: each rank holds a part of every sequence.

Ulysses (Jacobs et al. 2023, arXiv:2309.14509) exchanges parts of the sequence for heads, so that attention itself is
that of one rank; a second method gathers the keys and values of all ranks, and a third passes them on (`ring.py`).
With `balance` a rank holds a chunk from the front and one from the back: causal attention then costs all ranks the
same.

Shapes: B batch, T positions of a rank, S positions of the sequence, N query heads, K key/value heads, H head width.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regrow.models.attention import Mask, Sight, attend
from regrow.models.documents import Documents
from regrow.models.layers import Attention
from regrow.torch_compat import causal_lower_right
from regrow.trainer.config import ContextMethod
from regrow.trainer.parallel.collectives import all_gather_sum_grad, all_to_all
from regrow.trainer.parallel.ring import ring_attention
from regrow.trainer.parallel.sequence_chunks import positions_of, sequence_chunks

__all__ = ["ContextGroup", "apply_context_parallel", "held_chunks"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextGroup:
    """The ranks that share sequences.

    Attributes:
        name: of the process group.
        rank: this one's number among them.
        ranks: how many.
        balance: whether a rank holds two chunks of the sequence.
    """

    name: str
    rank: int
    ranks: int
    balance: bool


def _order(g: ContextGroup, length: int, device: torch.device) -> Tensor:
    """The index of each position of the sequence in the concatenation of the ranks' parts, int64 `(S,)`."""
    each = [positions_of(r, g.ranks, length, balance=g.balance, device=device) for r in range(g.ranks)]
    return torch.cat(each).argsort()


def _ulysses(g: ContextGroup, q: Tensor, k: Tensor, v: Tensor, mask: Mask, window: int) -> Tensor:
    length = q.shape[1] * g.ranks
    order_S = _order(g, length, q.device)
    q, k, v = (_heads_for_sequence(g, x)[:, order_S] for x in (q, k, v))
    out_BSNH = attend(q, k, v, mask, window)
    return _sequence_for_heads(g, out_BSNH[:, order_S.argsort()])


def _heads_for_sequence(g: ContextGroup, x_BTNH: Tensor) -> Tensor:
    """`(B, T, N, H)` to `(B, S, N / ranks, H)`, positions in the order of ranks."""
    parts = torch.stack(x_BTNH.chunk(g.ranks, dim=2))
    ones = [1] * g.ranks
    return torch.cat(all_to_all(parts, ones, ones, g.name).unbind(), dim=1)


def _sequence_for_heads(g: ContextGroup, x_BSNH: Tensor) -> Tensor:
    parts = torch.stack(x_BSNH.chunk(g.ranks, dim=1))
    ones = [1] * g.ranks
    return torch.cat(all_to_all(parts, ones, ones, g.name).unbind(), dim=2)


def _all_gather_kv(g: ContextGroup, q_BTNH: Tensor, k: Tensor, v: Tensor, mask: Mask, window: int) -> Tensor:
    length = q_BTNH.shape[1] * g.ranks
    order_S = _order(g, length, q_BTNH.device)
    k_BSKH, v_BSKH = (all_gather_sum_grad(x, 1, g.name)[:, order_S] for x in (k, v))
    chunks = held_chunks(g, length)
    out = []
    for number, ((start, stop), q_BCNH) in enumerate(zip(chunks, q_BTNH.chunk(len(chunks), dim=1), strict=True)):
        # A chunk sees no position behind its own end.
        k_seen, v_seen = k_BSKH[:, :stop], v_BSKH[:, :stop]
        if isinstance(mask, Documents):
            sight: Sight = mask.prepared[window][number]
            out.append(sight.attend(q_BCNH, k_seen, v_seen, window))
        else:
            out.append(_attend_up_to(q_BCNH, k_seen, v_seen, start))
    return torch.cat(out, dim=1)


def _attend_up_to(q_BTNH: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    """Attention of the positions from `start` on, the last ones of the keys."""
    stop = k.shape[1]
    allowed: Any
    if q_BTNH.device.type != "cpu" and not torch.compiler.is_compiling():
        # Keeps the flash kernel, which takes no explicit mask. The compiler knows no such object.
        allowed = causal_lower_right(stop - start, stop)
    else:
        positions_S = torch.arange(stop, device=q_BTNH.device)
        allowed = positions_S[start:, None] >= positions_S[None, :]
    out_BNTH = F.scaled_dot_product_attention(
        q_BTNH.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=allowed,
        enable_gqa=q_BTNH.shape[2] != k.shape[2],
    )
    return out_BNTH.transpose(1, 2)


def held_chunks(g: ContextGroup, length: int) -> list[tuple[int, int]]:
    """Where the chunks that a rank holds begin and end in the sequence."""
    held = sequence_chunks(g.rank, g.ranks, balance=g.balance)
    size = length // (g.ranks * len(held))
    return [(p * size, (p + 1) * size) for p in held]


def _ring(g: ContextGroup, q: Tensor, k: Tensor, v: Tensor, mask: Mask, window: int) -> Tensor:
    first_BS = mask.prepared[window] if isinstance(mask, Documents) else None
    return ring_attention(q, k, v, first_BS, rank=g.rank, ranks=g.ranks, balance=g.balance, group=g.name)


_METHODS = {ContextMethod.ulysses: _ulysses, ContextMethod.gather: _all_gather_kv, ContextMethod.ring: _ring}


def apply_context_parallel(model: nn.Module, group: ContextGroup, method: ContextMethod) -> None:
    """Lets every attention see the whole sequence; documents are then those of whole sequences."""
    attend_with = _METHODS[method]

    def attend_across(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, mask: Mask, window: int = 0) -> Tensor:
        return attend_with(group, q_BTNH, k_BTKH, v_BTKH, mask, window)

    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = attend_across
