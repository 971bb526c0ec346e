"""Qwen3, dense and with experts, in Hugging Face's layout; RoPE's order of rows is the same there.

transformers keeps experts fused in memory; on the disk each expert has keys of its own.
"""

from collections.abc import Mapping
from typing import Any

from regrow.errors import ConfigError
from regrow.models.hf import MOST_LAYERS, HfFamily, HfKey, block_keys, end_keys, require, rope_fields, whole
from regrow.models.hf_decoder import (
    FEED_FORWARD,
    HEAD_NORMS,
    MLP,
    NORMS,
    PROJECTIONS,
    describe_decoder,
    read_decoder,
)
from regrow.models.qwen3.config import Qwen3Config, Qwen3MoeConfig, ScoreFunction

__all__ = ["FAMILY"]

_ATTENTION = {**PROJECTIONS, **HEAD_NORMS, **NORMS}


def _dense_keys(config: Qwen3Config) -> list[HfKey]:
    return end_keys(config, block_keys({**_ATTENTION, **FEED_FORWARD}, config.n_layers))


# What Hugging Face's Qwen3-MoE has no fields for, and what it computes.
_FIXED_THERE = {
    "score_func": ScoreFunction.softmax,
    "n_shared_experts": 0,
    "n_expert_groups": 1,
    "topk_groups": 1,
    "route_scale": 1.0,
}


def _check_expressible(config: Qwen3MoeConfig) -> None:
    for name, fixed in _FIXED_THERE.items():
        value = getattr(config, name)
        if value != fixed:
            found, wanted = (v.value if isinstance(v, ScoreFunction) else v for v in (value, fixed))
            raise ConfigError(
                f"model.{name} must be {wanted} for Hugging Face's layout, whose Qwen3MoeForCausalLM has no field "
                f"for it, but is {found}; export with --format torch or safetensors, or use {wanted}"
            )


def _moe_keys(config: Qwen3MoeConfig) -> list[HfKey]:
    _check_expressible(config)
    blocks = block_keys({**_ATTENTION, "moe.router.gate.weight": "mlp.gate.weight"}, config.n_layers)
    experts = [
        HfKey(
            name=f"layers.{n}.moe.experts.{name}",
            hf_name=f"model.layers.{n}.mlp.experts.{e}.{hf_name}.weight",
            index=e,
        )
        for n in range(config.n_layers)
        for name, hf_name in MLP.items()
        for e in range(config.n_experts)
    ]
    return end_keys(config, [*blocks, *experts])


def _describe_common(config: Qwen3Config | Qwen3MoeConfig) -> dict[str, Any]:
    return {**describe_decoder(config), "use_sliding_window": False}


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
    require(fields, "use_sliding_window", wanted=False, model="Qwen3")
    rope = rope_fields(fields)
    require(rope, "rope_type", "default", "Qwen3")
    shared = read_decoder(fields, name, rope, "Qwen3")
    quotient = max(1, shared["dim"] // shared["n_heads"])
    return {**shared, "head_dim": whole(fields, "head_dim", default=head_dim or quotient)}


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
