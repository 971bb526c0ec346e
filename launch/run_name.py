"""The default of `run.name`, as an OmegaConf resolver."""

import re
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from launch.identity import config_hash, name_from_overrides

__all__ = ["register_resolver"]

_SECTIONS = ("model", "data", "optimizer", "scheduler", "precision", "train", "seed")


def register_resolver() -> None:
    """Makes `${regrow_run_name:}` and `${regrow_folder_name:PATH}` known."""
    OmegaConf.register_new_resolver("regrow_run_name", _run_name, replace=True)
    OmegaConf.register_new_resolver("regrow_folder_name", _folder_name, replace=True)


def _folder_name(path: str) -> str:
    """A folder's own name, with nothing in it that a run's name could not have."""
    return re.sub(r"[^\w.+=-]", "_", Path(path).expanduser().resolve().name, flags=re.ASCII).lstrip(".") or "model"


def _run_name(*, _root_: DictConfig) -> str:
    chosen = {name: _root_._get_node(name) for name in _SECTIONS}
    plain = OmegaConf.to_container(
        OmegaConf.masked_copy(_root_, list(chosen)), resolve=True, enum_to_str=True, throw_on_missing=False
    )
    assert isinstance(plain, dict)
    config: dict[str, Any] = {str(k): v for k, v in plain.items()}
    model_name = str(config["model"]["name"])
    hydra = _hydra(_root_)
    if hydra is not None and hydra.mode is RunMode.MULTIRUN:
        name = name_from_overrides(model_name, _canonical(_root_, list(hydra.overrides.task)))
        if name is not None:
            return name
    return f"{model_name}-{config_hash(config)}"


def _hydra(root: DictConfig) -> Any:
    """Hydra's own node: part of the config while it composes, global while the job runs."""
    if "hydra" in root:
        return root.hydra
    return HydraConfig.get() if HydraConfig.initialized() else None


def _canonical(root: DictConfig, overrides: list[str]) -> list[tuple[str, Any]]:
    """Overrides with the values that the config has, so that 1e-3 and 0.001 are one run."""
    pairs = []
    for override in OverridesParser.create().parse_overrides(overrides):
        key = override.key_or_group
        value = OmegaConf.select(root, key) if "/" not in key else None
        chosen = override.get_value_element_as_str() if value is None or OmegaConf.is_config(value) else value
        pairs.append((key, chosen))
    return pairs
