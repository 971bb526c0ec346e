"""Llama 3 in Hugging Face's layout: names, the order of q's and k's rows, and `config.json`."""

from collections.abc import Mapping
from typing import Any

from regrow.models.hf import HfFamily, HfKey, block_keys, end_keys, number, require, rope_fields, whole
from regrow.models.hf_decoder import FEED_FORWARD, NORMS, PROJECTIONS, describe_decoder, read_decoder
from regrow.models.hf_rows import RopeHalves
from regrow.models.llama3.config import Llama3Config, RopeScalingConfig

__all__ = ["FAMILY"]


def _keys(config: Llama3Config) -> list[HfKey]:
    rotated = {
        "attention.wq.weight": RopeHalves(config.n_heads),
        "attention.wk.weight": RopeHalves(config.n_kv_heads),
    }
    names = {**PROJECTIONS, **FEED_FORWARD, **NORMS}
    return end_keys(config, block_keys(names, config.n_layers, rotated))


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
    return {**describe_decoder(config, scaling), "intermediate_size": config.ffn_dim, "mlp_bias": False}


def _read(fields: Mapping[str, Any], name: str) -> Llama3Config:
    require(fields, "mlp_bias", False, "Llama 3")
    rope = rope_fields(fields)
    shared = read_decoder(fields, name, rope, "Llama 3")
    require(fields, "head_dim", shared["dim"] // shared["n_heads"], "Llama 3")
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
    return Llama3Config(**shared, ffn_dim=whole(fields, "intermediate_size"), rope_scaling=scaling)


FAMILY = HfFamily(
    architecture="LlamaForCausalLM",
    model_type="llama",
    config_class=Llama3Config,
    keys=_keys,
    describe=_describe,
    read=_read,
)
