"""A complete Hugging Face folder from weights under our names: shards, index, config and tokenizer files."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoint.convert import CastSource, ConversionResult, convert
from checkpoint.mapped import InverseSource
from checkpoint.outputs import plan_safetensors
from checkpoint.source import TensorSource
from models.config import ModelConfig
from models.hf import family_of
from trainer.data.tokenizer import end_of_text_id, load_tokenizer

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
    inverse: TensorSource = InverseSource(source, family_of(export.config).keys(export.config))
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
    has_tokenizer = "tokenizer.json" in files or "tokenizer.model" in files
    end: int | None = None
    if not has_tokenizer and export.tokenizer is not None:
        files["tokenizer.json"] = export.tokenizer.read_bytes()
        end, files["tokenizer_config.json"] = _tokenizer_config(export.tokenizer, export.config.max_seq_len)
    files["config.json"] = _json(_config(export, dtype, end))
    generation = _assets_json(export.assets, "generation_config.json")
    if not generation:
        fields = json.loads(files["config.json"])
        ids = {k: fields[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if fields.get(k) is not None}
        generation = {"_from_model_config": True, **ids}
    files["generation_config.json"] = _json(generation)
    return files


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _assets_json(assets: Path | None, name: str) -> dict[str, Any]:
    if assets is None or not (assets / name).is_file():
        return {}
    found: dict[str, Any] = json.loads((assets / name).read_text())
    return found


def _config(export: HfExport, dtype: torch.dtype, end: int | None) -> dict[str, Any]:
    """`config.json`: what the assets' says and our model does not know, and our model's own fields."""
    family = family_of(export.config)
    fields = _assets_json(export.assets, "config.json")
    if family.architecture not in fields.get("architectures", []):
        # Token ids and the like of another model would be wrong here; transformers' defaults too.
        fields = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": None}
    name = str(dtype).removeprefix("torch.")
    return {
        **fields,
        **family.describe(export.config),
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "dtype": name,
        "torch_dtype": name,
    }


def _tokenizer_config(tokenizer: Path, length: int) -> tuple[int | None, bytes]:
    """The end-of-text token's id, and a `tokenizer_config.json` for a bare `tokenizer.json`."""
    loaded = load_tokenizer(tokenizer)
    fields: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": length}
    try:
        end = end_of_text_id(loaded, tokenizer, None)
    except ValueError:
        return None, _json(fields)
    return end, _json({**fields, "eos_token": loaded.id_to_token(end)})
