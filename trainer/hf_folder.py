"""A complete Hugging Face folder from weights under our names: shards, index, config and tokenizer files."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from regrow.checkpoint.convert.conversion_plan import plan_safetensors
from regrow.checkpoint.convert.convert import CastSource, ConversionResult, convert
from regrow.checkpoint.format.tensor_source import TensorSource
from regrow.checkpoint.sources.hf_mapping import ToHfSource
from regrow.models.config import ModelConfig
from regrow.models.hf import CONFIG, TOKEN_IDS, carried_over, family_of, parse_config
from regrow.trainer.data.tokenizer import end_of_text_id, load_tokenizer

__all__ = ["HfExport", "export_hf", "small_files"]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_LICENCES = ("LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md")


@dataclass(frozen=True, kw_only=True, slots=True)
class HfExport:
    """What an export needs beside the weights.

    Attributes:
        config: the model.
        dtype: of the exported weights; None keeps each one's.
        max_shard_bytes: of one safetensors file.
        assets: a Hugging Face folder whose config and tokenizer files are taken over.
        tokenizer: a `tokenizer.json`, where `assets` has none.
    """

    config: ModelConfig
    dtype: torch.dtype | None
    max_shard_bytes: int
    assets: Path | None
    tokenizer: Path | None


def export_hf(
    source: TensorSource,
    out: Path,
    export: HfExport,
    *,
    threads: int = 2,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> ConversionResult:
    """Writes the folder, verified and atomically.

    Args:
        source: has our names.
        out: new, or an empty folder.
        export: what else goes in.
        threads: at work.
        progress: told the bytes done and in all.

    Raises:
        ValueError: one sentence; nothing lies at `out` then.
    """
    inverse: TensorSource = ToHfSource(source, family_of(export.config).keys(export.config))
    if export.dtype is not None:
        inverse = CastSource(inverse, export.dtype)
    dtypes = {i.dtype for i in inverse.infos.values() if i.dtype.is_floating_point}
    small = small_files(export, dtypes.pop() if len(dtypes) == 1 else torch.float32)
    return convert(
        inverse,
        lambda infos, _work: plan_safetensors(infos, max_shard_bytes=export.max_shard_bytes, small=small),
        out,
        identity={"from": source.place, "format": "hf"},
        threads=threads,
        progress=progress,
    )


def small_files(export: HfExport, dtype: torch.dtype) -> dict[str, bytes]:
    """Everything in the folder but weights and index, by name."""
    files: dict[str, bytes] = {}
    if export.assets is not None:
        for name in (*TOKENIZER_FILES, *_LICENCES):
            if (export.assets / name).is_file():
                files[name] = (export.assets / name).read_bytes()
        if "auto_map" in (given := _fields_of(export.assets, "tokenizer_config.json")):
            # The code that it names does not go in.
            files["tokenizer_config.json"] = _json({k: v for k, v in given.items() if k != "auto_map"})
    has_tokenizer = "tokenizer.json" in files or "tokenizer.model" in files
    end: int | None = None
    if not has_tokenizer and export.tokenizer is not None:
        files["tokenizer.json"] = export.tokenizer.read_bytes()
        end, files["tokenizer_config.json"] = _tokenizer_config(export.tokenizer, export.config.max_seq_len)
    theirs, sampling = _fields_of(export.assets, CONFIG), _fields_of(export.assets, "generation_config.json")
    of_our_kind = family_of(export.config).architecture in (theirs.get("architectures") or [])
    if not has_tokenizer and ("tokenizer.json" in files or not of_our_kind):
        # Token ids are the tokenizer's: those of a folder whose tokenizer does not go in would be wrong here.
        theirs, sampling = {"eos_token_id": end}, {}
    config = _config(export, dtype, theirs)
    files[CONFIG] = _json(config)
    files["generation_config.json"] = _json(_generation(sampling, config))
    return files


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _fields_of(assets: Path | None, name: str) -> dict[str, Any]:
    """The fields of a small JSON file of the assets; none where it is not there."""
    if assets is None or not (assets / name).is_file():
        return {}
    return parse_config((assets / name).read_bytes(), str(assets / name))


def _config(export: HfExport, dtype: torch.dtype, theirs: dict[str, Any]) -> dict[str, Any]:
    """`config.json`: our model's own fields, and what stays true of another's."""
    family = family_of(export.config)
    name = str(dtype).removeprefix("torch.")
    return {
        **carried_over(theirs, export.config.vocab_size),
        **family.describe(export.config),
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "dtype": name,
        "torch_dtype": name,
    }


# How text is continued; nothing of the model that it was written for.
_GENERATION = ("repetition_penalty", "max_new_tokens")
_SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p")


def _generation(given: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """`generation_config.json`: the assets' way of sampling, and the ids that the model's config has."""
    names = [*_GENERATION, *(_SAMPLING if given.get("do_sample") is True else ())]
    kept = {name: given[name] for name in names if isinstance(given.get(name), int | float)}
    ids = carried_over(given, config["vocab_size"])
    found = {n: config[n] if ids[n] is None else ids[n] for n in TOKEN_IDS}
    origin = {} if given else {"_from_model_config": True}
    return {**origin, **kept, **{n: v for n, v in found.items() if v is not None}}


def _tokenizer_config(tokenizer: Path, length: int) -> tuple[int | None, bytes]:
    """The end-of-text token's id, and a `tokenizer_config.json` for a bare `tokenizer.json`."""
    loaded = load_tokenizer(tokenizer)
    fields: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": length}
    try:
        end = end_of_text_id(loaded, tokenizer, None)
    except ValueError:
        return None, _json(fields)
    return end, _json({**fields, "eos_token": loaded.id_to_token(end)})
