"""Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245): causal, within documents, within a window.

What each position sees is an interval of keys, `first` to `last`: itself and those before, of its document, at most
`window` of them. Kernels take that in forms of their own, which are made once a batch: a dense mask here, segments
and blocks, which are for GPUs, in `attention_kernels.py`.

Shapes: B batch, T query positions, S key positions, N query heads, K key/value heads, H head width.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from regrow.models.config import WIDEST_SEGMENT_HEAD, AttentionKernel
from regrow.models.cpu import Kind, causal_attention, is_used, plain_attention
from regrow.models.documents import Documents
from regrow.models.key_value_cache import KeyValueCache

__all__ = ["DenseMask", "Mask", "Sight", "attend", "choose_kernel", "dense_mask", "first_seen", "prepared_for"]

Mask = Tensor | Documents | KeyValueCache | None


class Sight(Protocol):
    """What the queries of a batch see, as a kernel takes it."""

    def attend(self, q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, window: int) -> Tensor:
        """The attention, `(B, T, N, H)`, to as many keys as this was made for."""
        ...


class DenseMask(NamedTuple):
    """A mask of all queries and keys: for CPUs, and to compare with.

    Attributes:
        allowed: bool `(B or 1, 1, T, S)`, true where a query sees a key.
    """

    allowed: Tensor

    def attend(self, q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, window: int) -> Tensor:
        """See `Sight`; the mask has the window in it."""
        return plain_attention(q_BTNH, k_BSKH, v_BSKH, self.allowed)


def first_seen(starts_BS: Tensor, window: int) -> Tensor:
    """The first key that each position sees, int32 `(B, S)`.

    Args:
        starts_BS: where each position's document begins.
        window: keys that a position sees at most, itself among them; 0 is no limit.
    """
    if not window:
        return starts_BS
    positions_S = torch.arange(starts_BS.shape[1], dtype=torch.int32, device=starts_BS.device)
    return torch.maximum(starts_BS, positions_S - (window - 1))


def dense_mask(first_BT: Tensor, last_T: Tensor, keys: int) -> DenseMask:
    """A mask of queries that see the keys `first` to `last`.

    Args:
        first_BT: int32 `(B, T)`.
        last_T: int32 `(T,)`.
        keys: how many there are.
    """
    keys_S = torch.arange(keys, dtype=torch.int32, device=first_BT.device)
    return DenseMask(((keys_S >= first_BT[..., None]) & (keys_S <= last_T[:, None]))[:, None])


def prepared_for(documents: Documents, window: int) -> Sight:
    """What was made of a batch's documents for layers with this window."""
    sight: Sight = documents.prepared[window]
    return sight


def attend(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, mask: Mask, window: int = 0) -> Tensor:
    """Attention of a whole sequence to itself, `(B, T, N, H)`.

    Args:
        q_BTNH: queries.
        k_BTKH: keys.
        v_BTKH: values.
        mask: documents that have been prepared; or keys and values of what was read before; or bool, broadcastable to
            `(B, N, T, T)`, true where attention is allowed; None is causal.
        window: keys that a position sees at most, itself among them; 0 is no limit.
    """
    b, t, n, h = q_BTNH.shape
    if isinstance(mask, KeyValueCache):
        return mask.attend(q_BTNH, k_BTKH, v_BTKH, window)
    if isinstance(mask, Documents):
        return prepared_for(mask, window).attend(q_BTNH, k_BTKH, v_BTKH, window)
    if 0 < window < t:
        positions_T = torch.arange(t, device=q_BTNH.device)
        near = (positions_T[:, None] - positions_T < window) & (positions_T[:, None] >= positions_T)
        return plain_attention(q_BTNH, k_BTKH, v_BTKH, near if mask is None else near & mask)
    if mask is None and is_used(Kind.attention, (b, t, n, k_BTKH.shape[2], h), q_BTNH, k_BTKH, v_BTKH):
        return causal_attention(q_BTNH, k_BTKH, v_BTKH)
    return plain_attention(q_BTNH, k_BTKH, v_BTKH, mask)


def choose_kernel(
    chosen: AttentionKernel, dtype: torch.dtype, head_width: int, *, accelerator: bool
) -> AttentionKernel:
    """What `auto` stands for where there are documents or a window.

    Args:
        chosen: of the config.
        dtype: of queries, keys and values.
        head_width: elements of a head.
        accelerator: whether a GPU computes.
    """
    if chosen is not AttentionKernel.auto:
        return chosen
    # Float64 is there to be checked, and what is slow in it may be.
    if not accelerator or dtype is torch.float64:
        return AttentionKernel.sdpa
    fits = head_width % 8 == 0 and head_width <= WIDEST_SEGMENT_HEAD
    if dtype in (torch.bfloat16, torch.float16) and fits:
        return AttentionKernel.varlen
    return AttentionKernel.flex
