"""Any checkpoint's tensors under our names: which layout they lie in is known from their names, never guessed.

Hugging Face's names mean its order of rows, with or without a `config.json` beside them; other names are ours, or
torchtitan's of whichever year, whose rows are ours.
"""

# mypy has no type for "a class that may be abstract", which is what a field asks for (PEP 747 would bring it).
# mypy: disable-error-code="type-abstract"

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from regrow.checkpoint.errors import CheckpointError
from regrow.checkpoint.format.tensor_source import Box, TensorInfo, TensorSource
from regrow.checkpoint.load.initial_load import RenamedSource, same_tensor, weights_of
from regrow.checkpoint.load.open_source import open_source
from regrow.checkpoint.sources.hf_mapping import FromHfSource
from regrow.checkpoint.storage.base import Storage
from regrow.checkpoint.storage.opening import as_storage
from regrow.errors import ConfigError
from regrow.launch.config.resolve import construct
from regrow.models.base import LanguageModel
from regrow.models.config import DecoderConfig, ModelConfig
from regrow.models.derived import is_derived
from regrow.models.hf import (
    CONFIG,
    EMBEDDING,
    HEAD,
    HfKey,
    check_not_quantised,
    family_of,
    has_hf_names,
    parse_config,
    read_config,
)
from regrow.models.torchtitan import fused_keys, our_name

__all__ = [
    "OpenedWeights",
    "WeightsSource",
    "as_stored",
    "buffers_of",
    "contradictions",
    "model_of_folder",
    "model_on_meta",
    "open_weights",
    "shapes_of",
    "vocabulary_of",
]

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OpenedWeights:
    """A checkpoint under our names.

    Attributes:
        source: the tensors.
        in_hf: they lie in Hugging Face's layout.
        unused: stored names that nothing takes.
        same: those of them that hold what another name holds.
        idle_rules: rules of `load_rename` that changed no name.
    """

    source: TensorSource
    in_hf: bool
    unused: tuple[str, ...] = ()
    same: tuple[str, ...] = ()
    idle_rules: tuple[str, ...] = ()


@final
class WeightsSource(TensorSource):
    """A checkpoint's weights, without what lies beside them."""

    def __init__(self, source: TensorSource) -> None:
        self.place = source.place
        self._source = source
        self.infos: Mapping[str, TensorInfo] = {n: source.infos[n] for n in weights_of(source)}

    def read(self, name: str, box: Box) -> Tensor:
        return self._source.read(name, box)

    def close(self) -> None:
        self._source.close()


def open_weights(
    place: Storage, config: ModelConfig | None, rules: Sequence[tuple[str, str]] = (), *, find_copies: bool = True
) -> OpenedWeights:
    """Opens what `open_source` opens, under our names.

    Args:
        place: a file, a step, a run, or a folder.
        config: of the model that the weights are for; None where it is not known.
        rules: (pattern, replacement) pairs for the stored names.
        find_copies: say in `same` what is a copy, which reads a tied embedding and what lies beside it.

    Raises:
        CheckpointError: it cannot be read, or a model must be known for it.
        ValueError: its `config.json` says that it is quantised.
    """
    raw = open_source(place)
    try:
        renamed = RenamedSource(raw, rules)
        in_hf = has_hf_names(renamed.infos, config)
        stored: TensorSource = renamed if in_hf else RenamedSource(renamed, (), our_name)
        stored.infos = {n: info for n, info in stored.infos.items() if not is_derived(n)}
        opened = _from_hf(place, stored, config) if in_hf else _from_ours(stored, config)
        embedding, head = (k.hf_name if in_hf else k.name for k in (EMBEDDING, HEAD))
        tied = getattr(config, "tied_embeddings", False) and embedding in stored.infos and head in stored.infos
        copied = tied and find_copies and same_tensor(stored, embedding, head)
        return dataclasses.replace(opened, same=(head,) if copied else (), idle_rules=renamed.idle_rules)
    except BaseException:
        raw.close()
        raise


def _from_hf(place: Storage, source: TensorSource, config: ModelConfig | None) -> OpenedWeights:
    if config is None:
        raise CheckpointError(
            f"--model must be given for {source.place}, whose tensors have Hugging Face's names and no config.json "
            "says of which model; use --model llama3_8b"
        )
    where = f"{place.url}/{CONFIG}"
    if place.exists(CONFIG):
        check_not_quantised(parse_config(place.read(CONFIG), where), where)
    keys = _with_either_name(source, config, family_of(config).keys(config), EMBEDDING.hf_name, HEAD.hf_name)
    mapped = FromHfSource(source, keys, strict=False)
    weights = set(weights_of(source))
    return OpenedWeights(source=mapped, in_hf=True, unused=tuple(n for n in mapped.unused if n in weights))


def _from_ours(source: TensorSource, config: ModelConfig | None) -> OpenedWeights:
    if not isinstance(config, DecoderConfig):
        return OpenedWeights(source=source, in_hf=False)
    fused = fused_keys(config, source.infos.keys())
    taken = {key.hf_name for key in fused}
    keys = [HfKey(name=n, hf_name=n) for n in source.infos if n not in taken]
    keys = _with_either_name(source, config, keys, EMBEDDING.name, HEAD.name)
    return OpenedWeights(source=FromHfSource(source, [*keys, *fused]), in_hf=False)


def _with_either_name(
    source: TensorSource, config: ModelConfig, keys: list[HfKey], embedding: str, head: str
) -> list[HfKey]:
    """Where a model's output layer is its embedding, the matrix may lie there under either name."""
    if not getattr(config, "tied_embeddings", False) or embedding in source.infos or head not in source.infos:
        return keys
    others = [k for k in keys if k.name not in (EMBEDDING.name, HEAD.name)]
    return [HfKey(name=EMBEDDING.name, hf_name=head), *others]


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Of all of a model's parameters, by name; tied ones once."""
    return {name: tuple(p.shape) for name, p in model_on_meta(config).named_parameters()}


def vocabulary_of(config: ModelConfig) -> tuple[str, ...]:
    """The names of the parameters whose rows are tokens."""
    return model_on_meta(config).vocabulary_parameters()


def buffers_of(config: ModelConfig) -> set[str]:
    """What a checkpoint of ours holds beside the parameters."""
    model = model_on_meta(config)
    return set(model.state_dict()) - {name for name, _ in model.named_parameters(remove_duplicate=False)}


def model_on_meta(config: ModelConfig) -> LanguageModel:
    """The model that a config describes, without memory."""
    with torch.device("meta"):
        return construct(config._target_, "model", LanguageModel, config)


# What no shape shows.
_UNSEEN = ("rms_norm_eps", "rope_parameters", "norm_topk_prob", "num_experts_per_tok", "num_attention_heads")


def contradictions(place: Storage, config: ModelConfig) -> list[str]:
    """Where a folder's `config.json` describes another model than the one that takes its weights."""
    if not place.exists(CONFIG):
        return []
    where = f"{place.url}/{CONFIG}"
    try:
        family, stored = read_config(parse_config(place.read(CONFIG), where), config.name, where)
    except ConfigError as error:
        return [str(error)]
    if type(stored) is not type(config):
        return [f"{where} is of the family {family.architecture}, and the model is not"]
    theirs, ours = family.describe(stored), family.describe(config)
    return [
        f"{name} in {where} is {theirs[name]}, but the model's is {ours[name]}"
        for name in _UNSEEN
        if theirs.get(name) != ours.get(name)
    ]


def model_of_folder(storage: Storage) -> ModelConfig:
    """The model that a Hugging Face folder on any storage is of, weights included; named as the folder.

    Raises:
        ValueError: it is of none that we have.
    """
    where = f"{storage.url}/{CONFIG}"
    fields = parse_config(storage.read(CONFIG), where)
    return as_stored(storage, read_config(fields, storage.url.rstrip("/").rpartition("/")[2], where)[1])


def as_stored(place: Storage | Path, config: ModelConfig) -> ModelConfig:
    """A folder's model, untied where the folder holds an output layer of its own, as transformers has it.

    Args:
        place: the folder, whose weights have a say where they contradict its `config.json`.
        config: as that file describes the model.
    """
    storage = as_storage(place)
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
