"""The catalog of what this process can set: Regrow's schemas and files, the launchers', and the user's packages'."""

import functools
from pathlib import Path

import regrow.conf
from regrow.launch.config.catalog import Catalog
from regrow.launch.config.choices import conf_folders, read_choices
from regrow.launch.config.package_schemas import find_and_load, known_schemas
from regrow.launch.config.schema import Config, schema_classes
from regrow.launch.sweep.launcher_config import LocalConfig, SlurmConfig

__all__ = ["own_catalog", "whole_catalog"]


@functools.cache
def own_catalog() -> Catalog:
    """Regrow's alone, whatever packages the user has."""
    return _catalog(())


def whole_catalog() -> Catalog:
    """With that of the user's packages, which are found from the working directory and imported.

    Raises:
        PackageError: one cannot be used.
    """
    packages = find_and_load()
    return _catalog(packages.names) if packages.names else own_catalog()


def _catalog(packages: tuple[str, ...]) -> Catalog:
    own = known_schemas() if packages else schema_classes()
    schemas = {**own, SlurmConfig.SCHEMA: SlurmConfig, LocalConfig.SCHEMA: LocalConfig}
    return Catalog(Config, schemas, read_choices([*map(Path, regrow.conf.__path__), *conf_folders(packages)]))
