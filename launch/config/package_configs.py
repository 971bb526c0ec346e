"""What Hydra must know of a user's own packages: their schemas, and their `conf/` folders."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError
from hydra.plugins.search_path_plugin import SearchPathPlugin

import regrow.conf
from regrow.launch.config.package_schemas import find_and_load, schemas_of
from regrow.launch.config.plugins import PackageError, UserPackages, active_packages
from regrow.launch.config.schema import register_schemas

__all__ = ["register_packages", "use_packages"]


def use_packages(environ: Mapping[str, str] = os.environ) -> UserPackages:
    """Finds the user's own packages, imports them, and makes their configs known to Hydra.

    Raises:
        PackageError: one sentence on what is wrong with them.
    """
    packages = find_and_load(environ)
    register_packages(packages)
    return packages


def register_packages(packages: UserPackages) -> None:
    """Makes the configs of packages that are loaded known to Hydra, and Regrow's own.

    Args:
        packages: the user's.

    Raises:
        PackageError: one sentence on what is wrong with them.
    """
    register_schemas()
    for name in packages.names:
        _register(name)
    Plugins.instance().register(_OwnConfigs)


def _register(package: str) -> None:
    for kind in schemas_of(package):
        _store(kind)
    for folder in _conf_folders(package):
        _check_no_clash(package, folder)


def _store(kind: type[Any]) -> None:
    where, schema = f"SCHEMA of {kind.__module__}.{kind.__qualname__}", kind.SCHEMA
    if not (isinstance(schema, tuple) and len(schema) == 2 and all(isinstance(s, str) and s for s in schema)):
        raise PackageError(f'{where} must be (group, name), but is {schema!r}; write ("model", "mine_schema")')
    group, name = schema
    store = ConfigStore.instance()
    try:
        other = store.load(f"{group}/{name}.yaml").node._metadata.object_type
    except ConfigLoadError:
        other = None
    if other is not None and _full_name(other) != _full_name(kind):
        raise PackageError(
            f"{where} must be a name of its own, but {group}/{name} is that of {_full_name(other)}; choose another "
            "one"
        )
    try:
        store.store(group=group, name=name, node=kind)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise PackageError(
            f"{kind.__module__}.{kind.__qualname__} must be a dataclass that OmegaConf can hold, but is not "
            f"({reason}); use numbers, texts, enums, lists and dataclasses for its fields"
        ) from error


def _full_name(kind: type[Any]) -> str:
    """What a class is known by: a notebook that loads a module again makes another class of the same name."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _conf_folders(package: str) -> list[Path]:
    return [folder for p in sys.modules[package].__path__ if (folder := Path(p, "conf").absolute()).is_dir()]


def _check_no_clash(package: str, folder: Path) -> None:
    """Of two files with one name Hydra would take the first and say nothing."""
    others = [Path(p) for p in regrow.conf.__path__]
    names = active_packages().names
    for name in names[: names.index(package)]:
        others += _conf_folders(name)
    for path in sorted([*folder.rglob("*.yaml"), *folder.rglob("*.yml")]):
        inside = path.relative_to(folder)
        other = next((o / inside for o in others if (o / inside).is_file()), None)
        if other is not None:
            raise PackageError(f"{path} must have a name of its own, but {other} has it too; choose another one")


@final
class _OwnConfigs(SearchPathPlugin):
    """Hydra finds the packages' YAML files behind Regrow's own."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for name in active_packages().names:
            for folder in _conf_folders(name):
                search_path.append(provider=name, path=f"file://{folder}")
