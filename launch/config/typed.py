"""The one conversion from Hydra's config to typed objects; nothing below the entry sees a DictConfig."""

import copy
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from regrow.launch.config.errors import UserError, check_no_hub_name, naming_fields
from regrow.launch.config.schema import Config
from regrow.models.from_hf_config import FromHfConfig
from regrow.models.hf import from_folder

__all__ = ["to_config", "to_dict"]


def to_dict(config: DictConfig) -> dict[str, Any]:
    """The config as JSON-like values, resolved."""
    values = OmegaConf.to_container(_resolve_hf(config), resolve=True, enum_to_str=True, throw_on_missing=False)
    assert isinstance(values, dict)
    return {str(k): v for k, v in values.items()}


def to_config(config: DictConfig) -> Config:
    """Typed objects.

    Raises:
        UserError: a field is missing, or `+` added one that no schema has.
        ValueError: `model=from_hf` with a folder that cannot be used.
    """
    config = _resolve_hf(config)
    for name in sorted(OmegaConf.missing_keys(config)):
        raise UserError(f"{name} must be set, but is missing; add {name}=VALUE")
    try:
        typed = OmegaConf.to_object(config)
    except (TypeError, AttributeError) as error:
        raise UserError(f"a field was added with + that no schema has ({error}); remove it") from error
    assert isinstance(typed, Config)
    return typed


def _resolve_hf(config: DictConfig) -> DictConfig:
    """The config with what follows from Hugging Face folders that it names written into it."""
    if OmegaConf.get_type(config, "model") is FromHfConfig and not OmegaConf.is_missing(config.model, "path"):
        config = _with_model(config)
    checkpoint = config.checkpoint
    if checkpoint.initial_load_in_hf and checkpoint.initial_load_path is None:
        if config.model.hf_assets_path is None:
            raise UserError(
                "checkpoint.initial_load_path must be set with checkpoint.initial_load_in_hf=true, but it and "
                "model.hf_assets_path are null; add checkpoint.initial_load_path=DIR"
            )
        config = copy.deepcopy(config)
        config.checkpoint.initial_load_path = config.model.hf_assets_path
    return config


def _with_model(config: DictConfig) -> DictConfig:
    """`model=from_hf` replaced by the family's own config, weights and tokenizer taken from the same folder."""
    given, path = config.model, Path(config.model.path).expanduser()
    check_no_hub_name("model.path", str(config.model.path))
    with naming_fields(("model.path", path)):
        model = from_folder(path, str(given.name))[1]
    for name in ("vocab_size", "max_seq_len"):
        if not OmegaConf.is_missing(given, name):
            setattr(model, name, given[name])
    model.hf_assets_path, model.load_weights = str(path), bool(given.load_weights)
    filled = copy.deepcopy(config)
    # The name was made from the command's own fields; with the folder's in their place it would be another one.
    filled.run.name = str(config.run.name)
    filled.model = OmegaConf.structured(model)
    with open_dict(filled.data):
        if "tokenizer" in filled.data and filled.data.tokenizer is None and (path / "tokenizer.json").is_file():
            filled.data.tokenizer = str(path)
    return filled
