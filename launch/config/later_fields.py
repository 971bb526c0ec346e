"""Fields that came after version 0.1.0, which count for a run only where they differ from their defaults.

A dataclass marks such a field with `field(default=…, metadata={"since": "0.2.0"})`, a user's own schemas too: adding
it then renames no run, and a run from before goes on as one that has the default. Pure.
"""

import dataclasses
from collections.abc import Mapping
from enum import Enum
from typing import Any

from omegaconf import DictConfig, OmegaConf

__all__ = ["MARK", "is_later", "later_defaults"]

MARK = "since"


def is_later(field: "dataclasses.Field[Any]") -> bool:
    """Whether a schema's field came later."""
    return MARK in field.metadata


def later_defaults(config: Any, prefix: str = "") -> dict[str, Any]:
    """The later fields of a config and their defaults as plain values, by dotted names.

    Args:
        config: typed, or composed by Hydra; or a section of either.
        prefix: of the names.
    """
    found: dict[str, Any] = {}
    kind = OmegaConf.get_type(config) if OmegaConf.is_config(config) else type(config)
    marked = {f.name: f for f in dataclasses.fields(kind) if is_later(f)} if dataclasses.is_dataclass(kind) else {}
    for name, child in _children(config):
        if name in marked:
            found |= _flat(f"{prefix}{name}", _default_of(marked[name]))
        elif child is not None:
            found |= later_defaults(child, f"{prefix}{name}.")
    return found


def _children(config: Any) -> list[tuple[str, Any]]:
    if isinstance(config, DictConfig):
        if config._is_none() or config._is_missing() or config._is_interpolation():
            return []
        return [(str(key), config._get_node(key)) for key in config]
    if isinstance(config, Mapping):
        return [(str(key), child) for key, child in config.items()]
    if dataclasses.is_dataclass(config):
        return [(f.name, getattr(config, f.name)) for f in dataclasses.fields(config)]
    return []


def _default_of(field: "dataclasses.Field[Any]") -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _flat(name: str, value: Any) -> dict[str, Any]:
    """A default as identities have it: sections as dotted names, enums by their names."""
    if dataclasses.is_dataclass(value):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {n: v for key, child in value.items() for n, v in _flat(f"{name}.{key}", child).items()}
    return {name: value.name if isinstance(value, Enum) else value}
