"""Hugging Face's names and `config.json` for our models: data, with an inverse, and nothing that touches tensors.

A family puts one `FAMILY = HfFamily(…)` into `models/<family>/hf.py`; it is found by that name. What reads and writes
tensors by these keys is `checkpoint.mapped`.
"""

import importlib
import json
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
from models.config import ModelConfig

__all__ = ["HfFamily", "HfKey", "block_keys", "families", "family_of", "from_folder", "require", "rope_fields"]


@dataclass(frozen=True, kw_only=True, slots=True)
class HfKey:
    """One tensor on the disk in Hugging Face's layout, and what it is of ours.

    Attributes:
        ours: our parameter's name.
        theirs: the name in their files.
        heads: above 0, the rows are those of so many attention heads, whose halves theirs holds one after the other
            and ours interleaved (RoPE as in Meta's code).
        expert: theirs is this slice of ours in dimension 0, with that dimension left out; None: all of it.
    """

    ours: str
    theirs: str
    heads: int = 0
    expert: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class HfFamily:
    """How a family's models are named and described there.

    Attributes:
        architecture: as in `config.json`'s `architectures`.
        model_type: as there.
        config_class: of our models.
        keys: all of a model's tensors on the disk; tied ones once.
        describe: our config as `config.json`'s fields.
        read: the inverse of `describe`; the second argument is a name for the flavour. Raises ValueError for what our
            model cannot do.
    """

    architecture: str
    model_type: str
    config_class: type[ModelConfig]
    keys: Callable[[Any], list[HfKey]]
    describe: Callable[[Any], dict[str, Any]]
    read: Callable[[Mapping[str, Any], str], ModelConfig]


def families() -> list[HfFamily]:
    """Every family with a `hf` module below `models`."""
    found = []
    for package in pkgutil.iter_modules(models.__path__, "models."):
        if package.ispkg and any(m.name == "hf" for m in pkgutil.iter_modules([_folder_of(package.name)])):
            found.append(importlib.import_module(f"{package.name}.hf").FAMILY)
    # A family may bring several architectures.
    return [f for entry in found for f in (entry if isinstance(entry, tuple) else (entry,))]


def _folder_of(package: str) -> str:
    return str(Path(models.__path__[0]) / package.rpartition(".")[2])


def family_of(config: ModelConfig) -> HfFamily:
    """The family of one of our configs.

    Raises:
        ValueError: it has no Hugging Face counterpart.
    """
    for family in families():
        if type(config) is family.config_class:
            return family
    raise ValueError(
        f"model must be of a family with a Hugging Face layout ({_names()}), but is {config.name}; "
        "export it with --format torch or safetensors"
    )


def _names() -> str:
    return ", ".join(sorted(f.architecture for f in families()))


def from_folder(folder: Path, name: str | None = None) -> tuple[HfFamily, ModelConfig]:
    """The family and the config of a Hugging Face folder, from its `config.json`.

    Args:
        folder: holds `config.json`.
        name: for the flavour; by default the folder's.

    Raises:
        ValueError: no `config.json`, or one of a model that we do not have.
    """
    path = folder / "config.json"
    try:
        fields = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder} must be a Hugging Face folder, but has no config.json; give the folder that holds it"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError, NotADirectoryError) as error:
        raise ValueError(f"{path} must be JSON, but is not ({error}); download it again") from error
    return read_config(fields, name or folder.resolve().name, str(path))


def read_config(fields: Mapping[str, Any], name: str, where: str) -> tuple[HfFamily, ModelConfig]:
    """The family and config that `config.json`'s fields describe; raises ValueError where we have no such model."""
    named = fields.get("architectures") or []
    for family in families():
        if family.architecture in named or (not named and fields.get("model_type") == family.model_type):
            try:
                config = family.read(fields, name)
            except KeyError as error:
                raise ValueError(f"{where} must have the field {error}, but has not; restore it") from error
            config.check()
            return family, config
    shown = ", ".join(named) or fields.get("model_type") or "nothing"
    raise ValueError(
        f"architectures in {where} must be one of {_names()}, but is {shown}; Regrow has no model of that kind"
    )


def require(fields: Mapping[str, Any], field: str, wanted: Any, model: str) -> None:
    """Refuses what our model does not have.

    Raises:
        ValueError: the field is there with another value.
    """
    value = fields.get(field, wanted)
    if value not in (wanted, None):
        raise ValueError(
            f"{field} in config.json must be {wanted!r} for {model}, but is {value!r}; it is not supported"
        )


def rope_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE's settings, from transformers 5's `rope_parameters` or the older fields; `rope_type` is always there."""
    rope = dict(fields.get("rope_parameters") or fields.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", fields.get("rope_theta", 10_000.0))
    return rope


def block_keys(pairs: Sequence[tuple[str, str, int]], layers: int) -> list[HfKey]:
    """Keys of the repeated blocks: (our name, their name, heads) within a block, for each of `layers`."""
    return [
        HfKey(ours=f"layers.{n}.{ours}", theirs=f"model.layers.{n}.{theirs}", heads=heads)
        for n in range(layers)
        for ours, theirs, heads in pairs
    ]
