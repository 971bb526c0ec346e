"""FlashAttention over segments of several lengths, apart from `torch_compat`: loading it loads torch's compiler.

That takes a second, so it is imported where such attention is computed.
"""

import inspect
from typing import Any

from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

__all__ = ["varlen_attention"]

# What it takes differs: older ones know causal attention alone, newer ones ask whether heads are shared.
_OPTIONS = frozenset(inspect.signature(varlen_attn).parameters)


def varlen_attention(
    q_QNH: Tensor,
    k_SKH: Tensor,
    v_SKH: Tensor,
    queries: Tensor,
    keys: Tensor,
    most_queries: int,
    most_keys: int,
    window_size: tuple[int, int],
) -> Tensor:
    """FlashAttention over segments of several lengths, `(Q, N, H)`; on a GPU in bfloat16 or float16, shapes on meta.

    Args:
        q_QNH: the queries of all segments.
        k_SKH: their keys; fewer heads are shared.
        v_SKH: their values.
        queries: int32, where segments begin and end among the queries.
        keys: likewise among the keys.
        most_queries: that a segment has.
        most_keys: likewise.
        window_size: keys that a query sees before and behind its own, where the last ones of a segment meet; -1 is no
            limit.
    """
    options: dict[str, Any] = {"window_size": window_size}
    if "window_size" not in _OPTIONS:
        assert window_size == (-1, 0), "this torch has no windows of attention"
        options = {"is_causal": True}
    if "enable_gqa" in _OPTIONS:
        options["enable_gqa"] = q_QNH.shape[1] != k_SKH.shape[1]
    out: Any = varlen_attn(q_QNH, k_SKH, v_SKH, queries, keys, most_queries, most_keys, **options)
    attended: Tensor = out
    return attended
