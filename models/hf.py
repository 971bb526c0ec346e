"""Hugging Face's names and `config.json` for the models here: data, with an inverse.

A family puts one `FAMILY = HfFamily(…)` into `models/<family>/hf.py`; it is found by that name. What reads and writes
tensors by these keys is `regrow.checkpoint.sources.hf_mapping`.
"""

import importlib
import json
import pkgutil
import re
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import regrow.models
from regrow.errors import ConfigError
from regrow.models.config import DecoderConfig, ModelConfig
from regrow.models.further import family_modules

if TYPE_CHECKING:
    # It needs torch, which a command that only reads a config does not wait for.
    from regrow.models.hf_rows import KeyTransform

__all__ = [
    "CONFIG",
    "EMBEDDING",
    "HEAD",
    "MOST_LAYERS",
    "TOKEN_IDS",
    "HfFamily",
    "HfKey",
    "RowGroups",
    "block_keys",
    "carried_over",
    "check_not_quantised",
    "end_keys",
    "families",
    "family_of",
    "from_folder",
    "has_hf_names",
    "number",
    "parse_config",
    "read_config",
    "require",
    "require_full_attention",
    "rope_fields",
    "whole",
]

CONFIG = "config.json"
# No config.json is larger.
_CONFIG_BYTES = 16 << 20
# Above every model's dimensions, layers and experts: what is allocated by a number from a file stays bounded.
_LARGEST = 1 << 26
MOST_LAYERS = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class RowGroups:
    """Which rows of a fused tensor are one of the model's tensors.

    The fused tensor's rows are `groups` groups of `blocks` blocks of equal height; the model's are the `count` blocks
    from `first` on of each group.
    """

    groups: int
    blocks: int
    first: int
    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class HfKey:
    """One tensor in files of another layout, and what it is of a model here.

    Attributes:
        name: the model's parameter.
        hf_name: the name in the files.
        index: the stored tensor is this slice of the parameter in dimension 0, with that dimension left out; None:
            all of it.
        rows: the parameter is some of the stored tensor's rows, which hold several parameters; None: all of them.
        transform: the stored rows are in another order; None: in the model's.
    """

    name: str
    hf_name: str
    index: int | None = None
    rows: RowGroups | None = None
    transform: "KeyTransform | None" = None


EMBEDDING = HfKey(name="tok_embeddings.weight", hf_name="model.embed_tokens.weight")
HEAD = HfKey(name="output.weight", hf_name="lm_head.weight")


@dataclass(frozen=True, kw_only=True, slots=True)
class HfFamily:
    """How a family's models are named and described by Hugging Face.

    Attributes:
        architecture: as in `config.json`'s `architectures`.
        model_type: as in `config.json`.
        config_class: of the models here.
        keys: all of a model's tensors in the files; tied ones once.
        describe: a config as `config.json`'s fields.
        read: the inverse of `describe`; the second argument is a name for the variant. Raises ConfigError for what
            the model here cannot do.
    """

    architecture: str
    model_type: str
    config_class: type[ModelConfig]
    keys: Callable[[Any], list[HfKey]]
    describe: Callable[[Any], dict[str, Any]]
    read: Callable[[Mapping[str, Any], str], ModelConfig]


def families() -> list[HfFamily]:
    """Every family with a `hf` module below `models`, and those that were registered."""
    found = []
    for package in pkgutil.iter_modules(regrow.models.__path__, "regrow.models."):
        if package.ispkg and any(m.name == "hf" for m in pkgutil.iter_modules([_folder_of(package.name)])):
            found.append(importlib.import_module(f"{package.name}.hf").FAMILY)
    found += [family for name in family_modules() if (family := _family_in(name)) is not None]
    # A family may bring several architectures.
    return [f for entry in found for f in (entry if isinstance(entry, tuple) else (entry,))]


def _family_in(module: str) -> Any:
    try:
        return getattr(importlib.import_module(module), "FAMILY", None)
    except Exception as error:
        reason = str(error).splitlines()[:1]
        raise ConfigError(
            f"{module} must be importable, but is not ({': '.join([type(error).__name__, *reason])}); correct it"
        ) from error


def _folder_of(package: str) -> str:
    return str(Path(regrow.models.__path__[0]) / package.rpartition(".")[2])


def family_of(config: ModelConfig) -> HfFamily:
    """The family of a config.

    Raises:
        ConfigError: it has no Hugging Face counterpart.
    """
    for family in families():
        if type(config) is family.config_class:
            return family
    raise ConfigError(
        f"model must be of a family with a Hugging Face layout ({_names()}), but is {config.name}; "
        "export it with --format torch or safetensors"
    )


def _names() -> str:
    return ", ".join(sorted(f.architecture for f in families()))


def from_folder(folder: Path, name: str | None = None) -> tuple[HfFamily, ModelConfig]:
    """The family and the config of a Hugging Face folder, from its `config.json`.

    Args:
        folder: holds `config.json`.
        name: for the variant; by default the folder's.

    Raises:
        ConfigError: no `config.json`, or one of a model that Regrow does not have.
    """
    path = folder / CONFIG
    try:
        kind = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(
            f"{folder} must be a Hugging Face folder, but has no config.json; give the folder that holds it"
        ) from error
    # Reading a named pipe would never end.
    if not stat.S_ISREG(kind.st_mode) or kind.st_size > _CONFIG_BYTES:
        raise ConfigError(
            f"{path} must be a file of at most {_CONFIG_BYTES >> 20} MiB, but is not; download it again"
        )
    fields = parse_config(path.read_bytes(), str(path))
    return read_config(fields, name or folder.resolve().name, str(path))


def parse_config(body: bytes, where: str) -> dict[str, Any]:
    """The fields of a `config.json`; raises ConfigError where it is none."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} must be JSON, but is not ({error}); download it again") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{where} must be a JSON object, but is {type(fields).__name__}; download it again")
    return fields


def read_config(fields: Mapping[str, Any], name: str, where: str) -> tuple[HfFamily, ModelConfig]:
    """The family and config that `config.json`'s fields describe.

    Raises:
        ConfigError: they describe a model that Regrow does not have, or none.
    """
    named = fields.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(n, str) for n in named):
        raise ConfigError(f"architectures in {where} must be a list of names, but is {named!r}; download it again")
    for family in families():
        if family.architecture in named or (not named and fields.get("model_type") == family.model_type):
            check_not_quantised(fields, where)
            try:
                config = family.read(fields, name)
            except KeyError as error:
                raise ConfigError(f"{where} must have the field {error}, but has not; restore it") from error
            except (TypeError, AttributeError, OverflowError) as error:
                raise ConfigError(
                    f"{where} must hold a model's dimensions, but one is of another type ({error}); download it again"
                ) from error
            _check_read(config, where)
            return family, config
    shown = ", ".join(named) or fields.get("model_type") or "nothing"
    raise ConfigError(
        f"architectures in {where} must be one of {_names()}, but is {shown}; Regrow has no model of that kind"
    )


def _check_read(config: ModelConfig, where: str) -> None:
    try:
        config.check()
    except ValueError as error:
        # The sentence names the config's fields and a remedy on the command line; the values are the file's.
        reason = str(error).partition(";")[0]
        raise ConfigError(
            f"{where} must describe a model that can be built, but {reason}; download it again"
        ) from error


def check_not_quantised(fields: Mapping[str, Any], where: str) -> None:
    """Refuses a folder whose weights are codes that need scales, as its `config.json` says.

    Raises:
        ConfigError: they are.
    """
    for field in ("quantization_config", "compression_config"):
        value = fields.get(field)
        if value:
            method = value.get("quant_method") if isinstance(value, Mapping) else None
            raise ConfigError(
                f"{field} in {where} must not be set, but is ({method or 'of an unnamed method'}): quantised weights "
                "are not supported; use the folder of the model in bfloat16, or dequantise it with transformers"
            )


# Parts of a name that no layout but Hugging Face's has, with the model's prefix or without.
_HF_NAME = re.compile(r"(^|\.)(embed_tokens\.|layers\.\d+\.self_attn\.|layers\.\d+\.mlp\.)")


def has_hf_names(names: Iterable[str], config: ModelConfig | None = None) -> bool:
    """Whether tensors of these names lie in Hugging Face's layout, rows included: the names are the format's mark.

    Args:
        names: of the stored tensors.
        config: of the model that they are for, whose family may have names of its own.
    """
    names = set(names)
    if any(_HF_NAME.search(n) for n in names):
        return True
    family = next((f for f in families() if type(config) is f.config_class), None)
    if family is None:
        return False
    # lm_head is a name in torchtitan's layout too.
    return any(k.hf_name in names for k in family.keys(config) if k.hf_name not in (HEAD.hf_name, k.name))


TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def carried_over(fields: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """Those fields of a `config.json` that stay true of another model; everything else describes its weights.

    Args:
        fields: of `config.json`; of the same tokenizer.
        vocab_size: the other model's; token ids beyond it become null.
    """
    kept: dict[str, Any] = {name: _token_id(fields.get(name), vocab_size) for name in TOKEN_IDS}
    spread, cached = fields.get("initializer_range"), fields.get("use_cache")
    if isinstance(spread, float) and 0 < spread < 1:
        kept["initializer_range"] = spread
    if isinstance(cached, bool):
        kept["use_cache"] = cached
    return kept


def _token_id(value: Any, vocab_size: int) -> int | list[int] | None:
    """One id or several, null where none is in the vocabulary."""
    several = [v for v in (value if isinstance(value, list) else [value]) if _is_token(v, vocab_size)]
    if not several:
        return None
    return several if isinstance(value, list) else int(several[0])


def _is_token(value: Any, vocab_size: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size


def require(fields: Mapping[str, Any], field: str, wanted: Any, model: str) -> None:
    """Refuses what a model here does not have.

    Raises:
        ConfigError: the field is there with another value.
    """
    value = fields.get(field, wanted)
    if value not in (wanted, None):
        raise ConfigError(
            f"{field} in config.json must be {wanted!r} for {model}, but is {value!r}; it is not supported"
        )


def require_full_attention(fields: Mapping[str, Any], model: str) -> None:
    """Refuses layers that see a window of the sequence alone, or are of another kind.

    Raises:
        ConfigError: `layer_types` names one.
    """
    kinds = fields.get("layer_types") or []
    others = [k for k in kinds if k != "full_attention"] if isinstance(kinds, list) else [kinds]
    if others:
        raise ConfigError(
            f"layer_types in config.json must be 'full_attention' alone for {model}, but has {others[0]!r}; it is "
            "not supported"
        )


def whole(fields: Mapping[str, Any], name: str, *, default: int | None = None, most: int = _LARGEST) -> int:
    """A dimension; raises KeyError where it is missing and has no default, ConfigError where it cannot be one."""
    value = fields[name] if default is None else fields.get(name, default)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ConfigError(
            f"{name} in config.json must be a whole number from 1 to {most}, but is {value!r}; download it again"
        )
    return value


def number(fields: Mapping[str, Any], name: str) -> float:
    """A positive number; raises KeyError where it is missing, ConfigError where it is none."""
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ConfigError(f"{name} in config.json must be a number above 0, but is {value!r}; download it again")
    return float(value)


def rope_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE's settings, from the older fields or transformers 5's `rope_parameters`; `rope_type` is always there."""
    # The older name wins, as in transformers.
    given = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"rope_parameters in config.json must be an object, but is {given!r}; download it again")
    rope = dict(given)
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise ConfigError(
            "rope_parameters in config.json must be those of all layers alike, but differ between kinds of layers; "
            "it is not supported"
        )
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    rope["rope_theta"] = rope.get("rope_theta") or fields.get("rope_theta") or 10_000.0
    # Rotates a part of each head alone; either object may have the field.
    require({**fields, **rope}, "partial_rotary_factor", 1.0, "Regrow")
    return rope


def end_keys(config: DecoderConfig, blocks: Sequence[HfKey]) -> list[HfKey]:
    """The keys of all of a decoder, given those of its blocks."""
    keys = [EMBEDDING, *blocks, HfKey(name="norm.weight", hf_name="model.norm.weight")]
    return keys if config.tied_embeddings else [*keys, HEAD]


def block_keys(
    names: Mapping[str, str], layers: int, transforms: "Mapping[str, KeyTransform] | None" = None
) -> list[HfKey]:
    """Keys of the repeated blocks.

    Args:
        names: within a block, the model's name and Hugging Face's.
        layers: how many blocks there are.
        transforms: of tensors whose rows are in another order, by the model's name within a block.
    """
    transforms = transforms or {}
    return [
        HfKey(name=f"layers.{n}.{name}", hf_name=f"model.layers.{n}.{hf_name}", transform=transforms.get(name))
        for n in range(layers)
        for name, hf_name in names.items()
    ]
