"""Composing configs in milliseconds: Hydra puts the groups together once, and sets the values each time."""

import copy
import functools
from collections.abc import Sequence
from pathlib import Path

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from regrow.launch.config import composition
from regrow.launch.config.package_configs import use_packages

__all__ = ["compose_config"]

_CONF = Path(__file__).resolve().parent.parent / "conf"


def compose_config(overrides: Sequence[str] = ()) -> DictConfig:
    """What `regrow.launch.config.composition.compose_config` returns; its groups are composed once for all tests.

    Raises:
        HydraException, OmegaConfBaseException: they cannot be composed.
    """
    if use_packages().names:
        return composition.compose_config(overrides)
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    groups = [o for o in parsed if _chooses(o)]
    config = copy.deepcopy(_of_groups(tuple(str(o.input_line) for o in groups)))
    # As Hydra does itself once the groups are together.
    ConfigLoaderImpl._apply_overrides_to_config([o for o in parsed if o not in groups], config)
    return config


@functools.lru_cache
def _of_groups(groups: tuple[str, ...]) -> DictConfig:
    return composition.compose_config(groups)


def _chooses(override: Override) -> bool:
    """Whether it says which file is taken, or is Hydra's own."""
    folder = _CONF / override.key_or_group
    return override.is_hydra_override() or (folder.is_dir() and not isinstance(override.value(), dict))
