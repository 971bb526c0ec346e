"""Llama 3 in Hugging Face's layout: names, the order of q's and k's rows, and `config.json`."""

from collections.abc import Mapping
from typing import Any

from regrow.models.hf import (
    MOST_LAYERS,
    HfFamily,
    HfKey,
    block_keys,
    end_keys,
    number,
    require,
    require_full_attention,
    rope_fields,
    whole,
)
from regrow.models.llama3.config import Llama3Config, RopeScalingConfig

__all__ = ["FAMILY"]


def _keys(config: Llama3Config) -> list[HfKey]:
    blocks = block_keys(
        [
            ("attention.wq.weight", "self_attn.q_proj.weight", config.n_heads),
            ("attention.wk.weight", "self_attn.k_proj.weight", config.n_kv_heads),
            ("attention.wv.weight", "self_attn.v_proj.weight", 0),
            ("attention.wo.weight", "self_attn.o_proj.weight", 0),
            ("feed_forward.w1.weight", "mlp.gate_proj.weight", 0),
            ("feed_forward.w2.weight", "mlp.down_proj.weight", 0),
            ("feed_forward.w3.weight", "mlp.up_proj.weight", 0),
            ("attention_norm.weight", "input_layernorm.weight", 0),
            ("ffn_norm.weight", "post_attention_layernorm.weight", 0),
        ],
        config.n_layers,
    )
    return end_keys(config, blocks)


def _describe(config: Llama3Config) -> dict[str, Any]:
    s = config.rope_scaling
    scaling = None
    if s.factor != 1.0:
        scaling = {
            "rope_type": "llama3",
            "factor": s.factor,
            "low_freq_factor": s.low_freq_factor,
            "high_freq_factor": s.high_freq_factor,
            "original_max_position_embeddings": s.original_max_seq_len,
        }
    return {
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.dim // config.n_heads,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        # Both spellings: transformers 5 reads the first, older versions and other engines the others.
        "rope_parameters": {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})},
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
    }


def _read(fields: Mapping[str, Any], name: str) -> Llama3Config:
    for field, wanted in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        require(fields, field, wanted, "Llama 3")
    require_full_attention(fields, "Llama 3")
    dim, heads = whole(fields, "hidden_size"), whole(fields, "num_attention_heads")
    require(fields, "head_dim", dim // heads, "Llama 3")
    rope = rope_fields(fields)
    scaling = RopeScalingConfig()
    if rope["rope_type"] == "llama3":
        scaling = RopeScalingConfig(
            factor=number(rope, "factor"),
            low_freq_factor=number(rope, "low_freq_factor"),
            high_freq_factor=number(rope, "high_freq_factor"),
            original_max_seq_len=whole(rope, "original_max_position_embeddings"),
        )
    else:
        require(rope, "rope_type", "default", "Llama 3")
    return Llama3Config(
        name=name,
        dim=dim,
        n_layers=whole(fields, "num_hidden_layers", most=MOST_LAYERS),
        n_heads=heads,
        n_kv_heads=whole(fields, "num_key_value_heads", default=heads),
        ffn_dim=whole(fields, "intermediate_size"),
        vocab_size=whole(fields, "vocab_size"),
        max_seq_len=whole(fields, "max_position_embeddings"),
        norm_eps=number(fields, "rms_norm_eps"),
        rope_theta=number(rope, "rope_theta"),
        rope_scaling=scaling,
        tied_embeddings=bool(fields.get("tie_word_embeddings", False)),
    )


FAMILY = HfFamily(
    architecture="LlamaForCausalLM",
    model_type="llama",
    config_class=Llama3Config,
    keys=_keys,
    describe=_describe,
    read=_read,
)
