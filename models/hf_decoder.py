"""What the decoders here have in common in Hugging Face's layout: names within a block, and `config.json`."""

from collections.abc import Mapping
from typing import Any

from regrow.errors import ConfigError
from regrow.models.config import DecoderConfig
from regrow.models.hf import MOST_LAYERS, number, require, require_full_attention, whole

__all__ = ["FEED_FORWARD", "HEAD_NORMS", "MLP", "NORMS", "PROJECTIONS", "describe_decoder", "read_decoder"]

# Names within a block, the model's and Hugging Face's.
PROJECTIONS = {
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
}
HEAD_NORMS = {
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
}
NORMS = {
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
MLP = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
FEED_FORWARD = {f"feed_forward.{name}.weight": f"mlp.{hf_name}.weight" for name, hf_name in MLP.items()}


def describe_decoder(config: DecoderConfig, scaling: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The fields of `config.json` that all decoders have.

    Args:
        config: the model's.
        scaling: how RoPE is stretched, with its `rope_type`; None where it is not.

    Raises:
        ConfigError: the family there has no window of this kind.
    """
    if config.window:
        raise ConfigError(
            f"model.window must be 0 for a Hugging Face folder of {config.name}, whose family there has none, but is "
            f"{config.window}; use 0, or leave out the export"
        )
    return {
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_width,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        # Both spellings: transformers 5 reads the first, older versions and other engines the others.
        "rope_parameters": {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})},
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
    }


def read_decoder(fields: Mapping[str, Any], name: str, rope: Mapping[str, Any], model: str) -> dict[str, Any]:
    """The inverse of `describe_decoder`: fields of a `DecoderConfig`.

    Args:
        fields: of `config.json`.
        name: for the variant.
        rope: what `rope_fields` made of them.
        model: for messages.

    Raises:
        KeyError: a field is missing.
        ConfigError: a field says what the decoders here cannot do.
    """
    require(fields, "hidden_act", "silu", model)
    require(fields, "attention_bias", wanted=False, model=model)
    require_full_attention(fields, model)
    heads = whole(fields, "num_attention_heads")
    return {
        "name": name,
        "dim": whole(fields, "hidden_size"),
        "n_layers": whole(fields, "num_hidden_layers", most=MOST_LAYERS),
        "n_heads": heads,
        "n_kv_heads": whole(fields, "num_key_value_heads", default=heads),
        "vocab_size": whole(fields, "vocab_size"),
        "max_seq_len": whole(fields, "max_position_embeddings"),
        "norm_eps": number(fields, "rms_norm_eps"),
        "rope_theta": number(rope, "rope_theta"),
        "tied_embeddings": bool(fields.get("tie_word_embeddings", False)),
    }
