"""The model that a Hugging Face folder is of, as our config."""

import dataclasses
import logging
from functools import lru_cache
from pathlib import Path

from regrow.checkpoint.load.initial_load import same_tensor
from regrow.checkpoint.load.open_source import open_source
from regrow.checkpoint.storage.base import Storage
from regrow.checkpoint.storage.opening import as_storage
from regrow.models.config import ModelConfig
from regrow.models.hf import CONFIG, EMBEDDING, HEAD, from_folder, parse_config, read_config

__all__ = ["config_of_folder", "model_of_folder"]

log = logging.getLogger(__name__)


def config_of_folder(folder: Path, name: str, *, weights: bool) -> ModelConfig:
    """The model that a local Hugging Face folder is of.

    Args:
        folder: holds `config.json`.
        name: for the variant.
        weights: its weights are to be used: they have a say where they contradict `config.json`.

    Raises:
        ValueError: it is of none that we have.
    """
    config = from_folder(folder, name)[1]
    return _as_stored(as_storage(folder), config) if weights else config


def model_of_folder(storage: Storage) -> ModelConfig:
    """The same of any storage, weights included; named as the folder."""
    where = f"{storage.url}/{CONFIG}"
    fields = parse_config(storage.read(CONFIG), where)
    return _as_stored(storage, read_config(fields, storage.url.rstrip("/").rpartition("/")[2], where)[1])


def _as_stored(storage: Storage, config: ModelConfig) -> ModelConfig:
    """Untied where the folder holds an output layer of its own, as transformers has it."""
    sizes = storage.sizes()
    if not getattr(config, "tied_embeddings", False) or not any(n.endswith(".safetensors") for n in sizes):
        return config
    if not _has_other_head(storage.url, tuple(sorted(sizes.items()))):
        return config
    log.warning(
        "%s holds an %s that is not the embedding, although its %s says tie_word_embeddings; the model is untied",
        storage.url,
        HEAD.hf_name,
        CONFIG,
    )
    return dataclasses.replace(config, tied_embeddings=False)  # type: ignore[call-arg]


@lru_cache(maxsize=8)
def _has_other_head(url: str, _sizes: tuple[tuple[str, int], ...]) -> bool:
    """Asked several times of one folder; the sizes tell whether it is still the same."""
    with open_source(url) as source:
        names = (EMBEDDING.hf_name, HEAD.hf_name)
        return all(n in source.infos for n in names) and not same_tensor(source, *names)
