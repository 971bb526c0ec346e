"""The user's own packages of this process, and the schemas that they bring beside Regrow's."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regrow.launch.config.plugins import (
    UserPackages,
    active_packages,
    find_packages,
    import_of,
    load_packages,
    modules_named,
)
from regrow.launch.config.schema import schema_classes

__all__ = ["find_and_load", "known_schemas", "schemas_of"]


def find_and_load(environ: Mapping[str, str] = os.environ) -> UserPackages:
    """Finds the user's own packages and imports them.

    Args:
        environ: the process' variables.

    Raises:
        PackageError: one sentence on what is wrong with them.
    """
    try:
        folder = Path.cwd()
    except FileNotFoundError:
        folder = Path("/")  # the working directory has been removed, and with it the project
    packages = find_packages(environ, folder)
    load_packages(packages)
    return packages


def known_schemas() -> dict[tuple[str, str], type[Any]]:
    """Regrow's schemas, but those of launchers, and those of the packages that are loaded, by (group, name)."""
    known = dict(schema_classes())
    for kind in (kind for name in active_packages().names for kind in schemas_of(name)):
        # One that is wrongly written is refused when it is registered.
        if isinstance(kind.SCHEMA, tuple) and len(kind.SCHEMA) == 2 and all(isinstance(s, str) for s in kind.SCHEMA):
            known[kind.SCHEMA] = kind
    return known


def schemas_of(package: str) -> list[type[Any]]:
    """The dataclasses with a `SCHEMA` in a loaded package's modules named `config` or `…_config`.

    Raises:
        PackageError: such a module cannot be imported.
    """
    found = []
    for name in modules_named(package, lambda stem: stem == "config" or stem.endswith("_config")):
        module = import_of(name)
        found += [
            kind
            for kind in vars(module).values()
            if isinstance(kind, type)
            and dataclasses.is_dataclass(kind)
            and kind.__module__ == name
            and "SCHEMA" in vars(kind)
        ]
    return found
