"""Weights of any layout under the models' names."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from regrow.checkpoint.storage.opening import as_storage
from regrow.launch.run.weights import open_weights, shapes_of, vocabulary_of
from tests.support import TINY_MODEL, typed_config


def test_what_follows_from_the_config_is_left_out(tmp_path: Path) -> None:
    tensors = {"tok_embeddings.weight": torch.ones(4, 2), "freqs_cis": torch.ones(2), "rope.freqs": torch.ones(2)}
    save_file(tensors, tmp_path / "a.safetensors")
    with open_weights(as_storage(tmp_path / "a.safetensors"), None).source as source:
        assert list(source.infos) == ["tok_embeddings.weight"]


def test_the_vocabulary_is_what_grows_with_it() -> None:
    for tied in ("false", "true"):
        small, large = (
            typed_config([*TINY_MODEL, f"model.tied_embeddings={tied}", f"model.vocab_size={n}"]).model
            for n in (320, 321)
        )
        grown = [n for n, shape in shapes_of(large).items() if shape != shapes_of(small)[n]]
        assert tuple(grown) == vocabulary_of(large)
