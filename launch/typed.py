"""The one conversion from Hydra's config to typed objects; nothing below the entry sees a DictConfig."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from launch.errors import UserError
from launch.schema import Config

__all__ = ["plain", "to_config"]


def plain(config: DictConfig) -> dict[str, Any]:
    """The config as JSON-like values, resolved."""
    values = OmegaConf.to_container(config, resolve=True, enum_to_str=True, throw_on_missing=False)
    assert isinstance(values, dict)
    return {str(k): v for k, v in values.items()}


def to_config(config: DictConfig) -> Config:
    """Typed objects.

    Raises:
        UserError: a field is missing, or `+` added one that no schema has.
    """
    for name in sorted(OmegaConf.missing_keys(config)):
        raise UserError(f"{name} must be set, but is missing; add {name}=VALUE")
    try:
        typed = OmegaConf.to_object(config)
    except (TypeError, AttributeError) as error:
        raise UserError(f"a field was added with + that no schema has ({error}); remove it") from error
    assert isinstance(typed, Config)
    return typed
