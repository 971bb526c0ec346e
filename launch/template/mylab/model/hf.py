"""The model in Hugging Face's layout: Mistral's class there takes any activation, and names everything as Llama's."""

from collections.abc import Mapping
from typing import Any

from regrow.launch.template.mylab.model.config import GegluConfig
from regrow.models.hf import MOST_LAYERS, HfFamily, number, require, rope_fields, whole
from regrow.models.llama3.hf import FAMILY as LLAMA3

__all__ = ["FAMILY"]

_ACTIVATION = "gelu_pytorch_tanh"
_WHO = "our GEGLU model"


def _describe(config: GegluConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_width,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "hidden_act": _ACTIVATION,
        "sliding_window": None,
        # Both spellings: transformers 5 reads the first, older versions and other engines the second.
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "rope_theta": config.rope_theta,
    }


def _read(fields: Mapping[str, Any], name: str) -> GegluConfig:
    rope = rope_fields(fields)
    dim, heads = whole(fields, "hidden_size"), whole(fields, "num_attention_heads")
    # Of what is left out there, Mistral has silu and a window.
    require({"hidden_act": "silu", **fields}, "hidden_act", _ACTIVATION, _WHO)
    require({"sliding_window": 4096, **fields}, "sliding_window", None, _WHO)
    require(fields, "head_dim", dim // heads, _WHO)
    require(rope, "rope_type", "default", _WHO)
    return GegluConfig(
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
        tied_embeddings=bool(fields.get("tie_word_embeddings", False)),
    )


FAMILY = HfFamily(
    architecture="MistralForCausalLM",
    model_type="mistral",
    config_class=GegluConfig,
    keys=LLAMA3.keys,
    describe=_describe,
    read=_read,
)
