"""Small random models made by `transformers`, of every architecture that Regrow has, as folders with several shards."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from regrow.checkpoint.format.tensor_source import TensorSource
from regrow.checkpoint.load.open_source import read_whole
from regrow.launch.config.resolve import construct
from regrow.models.base import LanguageModel
from regrow.models.config import ModelConfig

VOCABULARY = 320
_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "intermediate_size": 96,
}
_LLAMA_3_1 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
KINDS = ("llama3", "llama3_tied", "qwen3", "qwen3_moe")


@dataclass(frozen=True)
class HfModel:
    """A model and the folder that it was saved to."""

    model: PreTrainedModel
    folder: Path


def make(kind: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> HfModel:
    """A model with random weights, saved in shards of 100 kB."""
    fields = {**_COMMON, **changes}
    if kind == "llama3":
        model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**fields, rope_parameters=_LLAMA_3_1))
    elif kind == "llama3_tied":
        model = LlamaForCausalLM(LlamaConfig(**fields, tie_word_embeddings=True))
    elif kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**fields, head_dim=32))
    else:
        moe = {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**fields, **moe, head_dim=32))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            low = 0.5 if parameter.ndim == 1 else -0.1
            parameter.uniform_(low, low + 1.0 if parameter.ndim == 1 else 0.1, generator=generator)
    model.to(dtype).eval()
    model.save_pretrained(folder, max_shard_size="100KB")
    return HfModel(model, folder)


def tokens() -> Tensor:
    """A batch that both sides can read."""
    return torch.randint(0, VOCABULARY, (2, 48), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def ours(config: ModelConfig, source: TensorSource, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """Our model with the weights of a source that has our names."""
    model = construct(config._target_, "model", LanguageModel, config)  # type: ignore[type-abstract]
    model.to(dtype)
    model.init_buffers(torch.device("cpu"), 256)
    for name, parameter in model.named_parameters():
        parameter.copy_(read_whole(source, name))
    return model.eval()
