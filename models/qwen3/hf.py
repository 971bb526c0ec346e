"""Qwen3, dense and with experts, in Hugging Face's layout; RoPE's order of rows is the same there.

transformers keeps experts fused in memory; on the disk each expert has keys of its own.
"""

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
from regrow.models.qwen3.config import Qwen3Config, Qwen3MoeConfig

__all__ = ["FAMILY"]

_ATTENTION = [
    ("attention.wq.weight", "self_attn.q_proj.weight", 0),
    ("attention.wk.weight", "self_attn.k_proj.weight", 0),
    ("attention.wv.weight", "self_attn.v_proj.weight", 0),
    ("attention.wo.weight", "self_attn.o_proj.weight", 0),
    ("attention.q_norm.weight", "self_attn.q_norm.weight", 0),
    ("attention.k_norm.weight", "self_attn.k_norm.weight", 0),
    ("attention_norm.weight", "input_layernorm.weight", 0),
    ("ffn_norm.weight", "post_attention_layernorm.weight", 0),
]
_MLP = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def _dense_keys(config: Qwen3Config) -> list[HfKey]:
    mlp = [(f"feed_forward.{ours}.weight", f"mlp.{theirs}.weight", 0) for ours, theirs in _MLP.items()]
    return end_keys(config, block_keys([*_ATTENTION, *mlp], config.n_layers))


def _moe_keys(config: Qwen3MoeConfig) -> list[HfKey]:
    gate = [("moe.router.gate.weight", "mlp.gate.weight", 0)]
    experts = [
        HfKey(
            name=f"layers.{n}.moe.experts.{ours}",
            hf_name=f"model.layers.{n}.mlp.experts.{e}.{theirs}.weight",
            expert=e,
        )
        for n in range(config.n_layers)
        for ours, theirs in _MLP.items()
        for e in range(config.n_experts)
    ]
    return end_keys(config, [*block_keys([*_ATTENTION, *gate], config.n_layers), *experts])


def _describe_common(config: Qwen3Config | Qwen3MoeConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
        # Both spellings: transformers 5 reads the first, older versions and other engines the second.
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
    }


def _describe_dense(config: Qwen3Config) -> dict[str, Any]:
    return {**_describe_common(config), "intermediate_size": config.ffn_dim}


def _describe_moe(config: Qwen3MoeConfig) -> dict[str, Any]:
    return {
        **_describe_common(config),
        # Of dense layers, which there are none of.
        "intermediate_size": config.expert_ffn_dim,
        "moe_intermediate_size": config.expert_ffn_dim,
        # Both spellings again.
        "num_local_experts": config.n_experts,
        "num_experts": config.n_experts,
        "num_experts_per_tok": config.experts_per_token,
        "norm_topk_prob": config.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _read_common(fields: Mapping[str, Any], name: str, head_dim: int | None) -> dict[str, Any]:
    """`head_dim`: where the file has none; None is the quotient."""
    for field, wanted in (("hidden_act", "silu"), ("attention_bias", False), ("use_sliding_window", False)):
        require(fields, field, wanted, "Qwen3")
    require_full_attention(fields, "Qwen3")
    rope = rope_fields(fields)
    require(rope, "rope_type", "default", "Qwen3")
    dim, heads = whole(fields, "hidden_size"), whole(fields, "num_attention_heads")
    return {
        "name": name,
        "dim": dim,
        "n_layers": whole(fields, "num_hidden_layers", most=MOST_LAYERS),
        "n_heads": heads,
        "n_kv_heads": whole(fields, "num_key_value_heads", default=heads),
        "head_dim": whole(fields, "head_dim", default=head_dim or max(1, dim // heads)),
        "vocab_size": whole(fields, "vocab_size"),
        "max_seq_len": whole(fields, "max_position_embeddings"),
        "norm_eps": number(fields, "rms_norm_eps"),
        "rope_theta": number(rope, "rope_theta"),
        "tied_embeddings": bool(fields.get("tie_word_embeddings", False)),
    }


def _read_dense(fields: Mapping[str, Any], name: str) -> Qwen3Config:
    # transformers' own default.
    return Qwen3Config(**_read_common(fields, name, 128), ffn_dim=whole(fields, "intermediate_size"))


def _read_moe(fields: Mapping[str, Any], name: str) -> Qwen3MoeConfig:
    require(fields, "decoder_sparse_step", 1, "Qwen3-MoE")
    if fields.get("mlp_only_layers"):
        require(fields, "mlp_only_layers", [], "Qwen3-MoE")
    return Qwen3MoeConfig(
        **_read_common(fields, name, None),
        n_experts=whole(
            fields, "num_local_experts" if "num_local_experts" in fields else "num_experts", most=MOST_LAYERS
        ),
        experts_per_token=whole(fields, "num_experts_per_tok"),
        expert_ffn_dim=whole(fields, "moe_intermediate_size"),
        # transformers' own default is false; the released models say true.
        norm_topk_prob=bool(fields.get("norm_topk_prob", False)),
    )


FAMILY = (
    HfFamily(
        architecture="Qwen3ForCausalLM",
        model_type="qwen3",
        config_class=Qwen3Config,
        keys=_dense_keys,
        describe=_describe_dense,
        read=_read_dense,
    ),
    HfFamily(
        architecture="Qwen3MoeForCausalLM",
        model_type="qwen3_moe",
        config_class=Qwen3MoeConfig,
        keys=_moe_keys,
        describe=_describe_moe,
        read=_read_moe,
    ),
)
