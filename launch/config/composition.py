"""The root config from overrides alone, as the command composes it."""

from collections.abc import Sequence

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from regrow.launch.config.package_configs import use_packages
from regrow.launch.config.run_name import register_resolver

__all__ = ["compose_config"]


def compose_config(overrides: Sequence[str] = ()) -> DictConfig:
    """The composed config, without Hydra's own section.

    Args:
        overrides: as on the command line.

    Raises:
        HydraException, OmegaConfBaseException: they cannot be composed; `refusing` has the sentence for each.
    """
    register_resolver()
    use_packages()
    # Hydra can be initialised once in a process; whoever did that before has composed already.
    GlobalHydra.instance().clear()
    with initialize_config_module("regrow.conf", version_base="1.3"):
        return compose("config", overrides=list(overrides))
