"""What a token costs, out of a run's config alone: a report needs no model. Pure."""

from collections.abc import Mapping
from typing import Any

__all__ = ["flops_per_token"]


def flops_per_token(config: Mapping[str, Any]) -> float | None:
    """Floating-point operations of one training token, as the model itself counts them.

    Args:
        config: of a run, as plain values.

    Returns:
        6 per matrix weight that a token meets, and 12 · layers · heads' width · T for attention (Chowdhery et al.
        2022, app. B); None for a model of another kind.
    """
    model, data = config.get("model"), config.get("data")
    if not isinstance(model, Mapping) or not isinstance(data, Mapping):
        return None
    try:
        dim, layers, vocabulary = int(model["dim"]), int(model["n_layers"]), int(model["vocab_size"])
        heads, kv_heads, seq_len = int(model["n_heads"]), int(model["n_kv_heads"]), int(data["seq_len"])
        width = int(model.get("head_dim") or dim // heads)
        if model.get("n_experts"):
            met = int(model["experts_per_token"]) + int(model.get("n_shared_experts") or 0)
            layer = dim * (int(model["n_experts"]) + 3.0 * met * int(model["expert_ffn_dim"]))
        else:
            layer = 3.0 * dim * int(model["ffn_dim"])
        attended = min(seq_len, int(model.get("window") or 0) or seq_len)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    attention = 2 * dim * heads * width + 2 * dim * kv_heads * width
    return 6.0 * (layers * (attention + layer) + dim * vocabulary) + 12.0 * layers * heads * width * attended
