"""Attention within documents and windows in plain words, to compare with."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["by_segments", "plain_mask"]


def plain_mask(numbers_BS: Tensor, window: int) -> Tensor:
    """Who sees whom, bool `(B, 1, S, S)`: those before, of the same document, within the window."""
    length = numbers_BS.shape[1]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    allowed = (distance >= 0) & (distance < (window or length))
    return (allowed & (numbers_BS[:, :, None] == numbers_BS[:, None]))[:, None]


def by_segments(
    q_QNH: Tensor,
    k_SKH: Tensor,
    v_SKH: Tensor,
    queries: Tensor,
    keys: Tensor,
    most_queries: int,
    most_keys: int,
    window_size: tuple[int, int],
) -> Tensor:
    """What `torch_compat.varlen_attention` computes, by a loop over the segments."""
    out = []
    before, behind = window_size
    assert behind == 0
    for q0, q1, k0, k1 in zip(
        queries[:-1].tolist(), queries[1:].tolist(), keys[:-1].tolist(), keys[1:].tolist(), strict=True
    ):
        assert q1 - q0 <= most_queries
        assert k1 - k0 <= most_keys
        if q1 == q0:
            continue
        # The last query meets the last key.
        distance = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0) - torch.arange(k1 - k0)
        allowed = (distance >= 0) & (distance <= (before if before >= 0 else k1))
        q, k, v = (x.transpose(0, 1) for x in (q_QNH[q0:q1], k_SKH[k0:k1], v_SKH[k0:k1]))
        part = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=allowed, enable_gqa=True)
        out.append(part[0].transpose(0, 1))
    return torch.cat(out)
