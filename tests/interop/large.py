"""Models too large for the tests to hold: their tensors are made when they are read."""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from regrow.checkpoint.format.tensor_source import Box, TensorInfo, TensorSource
from regrow.launch.commands.identify_model import settings_of_model
from regrow.models.hf import family_of
from regrow.models.llama3.config import Llama3Config


@final
class RandomModel(TensorSource):
    """A Llama 3 under our names, float32; each box has values of its own, made quickly."""

    def __init__(self, *, layers: int, dim: int, vocab: int) -> None:
        self.config = Llama3Config(
            name="random",
            dim=dim,
            n_layers=layers,
            n_heads=dim // 64,
            n_kv_heads=dim // 64,
            ffn_dim=dim * 4,
            vocab_size=vocab,
            max_seq_len=256,
        )
        self.settings: dict[str, Any] = settings_of_model(self.config)
        self.place = "random"
        from regrow.models.llama3.model import Llama3

        with torch.device("meta"):
            model = Llama3(self.config)
        named = dict(model.named_parameters())
        self.keys = family_of(self.config).keys(self.config)
        self.infos: Mapping[str, TensorInfo] = {
            n: TensorInfo(dtype=torch.float32, shape=tuple(p.shape)) for n, p in named.items()
        }

    def read(self, name: str, box: Box) -> Tensor:
        shape = [stop - start for start, stop in box]
        count = torch.Size(shape).numel()
        first = hash((name, box)) % 1000
        return torch.arange(first, first + count, dtype=torch.float32).remainder_(977.0).div_(977.0).view(shape)
