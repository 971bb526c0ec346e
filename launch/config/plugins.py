"""A user's own packages: which ones are named, and making them importable here and in every process of a run.

Naming a package is the permission to import it. Packages are named by a project, by an installed distribution or by
the environment; a config that was read from a checkpoint never names one.
"""

import importlib
import importlib.util
import keyword
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from regrow.errors import ConfigError
from regrow.models.further import register_families

__all__ = [
    "PATH_VARIABLE",
    "VARIABLE",
    "PackageError",
    "UserPackages",
    "active_packages",
    "allowed_roots",
    "find_packages",
    "how_to_name",
    "import_of",
    "load_packages",
    "modules_named",
]

# The names, comma-separated; where it is set, even to nothing, nobody else is asked.
VARIABLE = "REGROW_PACKAGES"
# The folder that packages are looked for in which are not installed.
PATH_VARIABLE = "REGROW_PACKAGES_PATH"
_GROUP = "regrow.plugins"
_PROJECT = "pyproject.toml"


class PackageError(ConfigError):
    """A package of the user's own cannot be used; the message is the whole explanation."""


@dataclass(frozen=True, slots=True)
class UserPackages:
    """What was named, as it travels to ranks, sweeps and jobs.

    Attributes:
        names: of the packages, as they are imported.
        folder: absolute; it and its `src` are searched for what is not installed. Empty: none is.
        named_in: where the names stand, for messages.
    """

    names: tuple[str, ...] = ()
    folder: str = ""
    named_in: str = VARIABLE

    def __reduce__(self) -> tuple[Any, ...]:
        """A process that receives this has the packages from then on: what is pickled behind it may be theirs."""
        return _received, (self.names, self.folder, self.named_in)

    def environment(self) -> dict[str, str]:
        """The variables that name the same packages to another process, whatever its working directory."""
        return {VARIABLE: ",".join(self.names), PATH_VARIABLE: self.folder}


_active = UserPackages()


def active_packages() -> UserPackages:
    """Those of this process."""
    return _active


def allowed_roots() -> tuple[str, ...]:
    """What a `_target_` of a user's own begins with, the dot included."""
    return tuple(f"{name}." for name in _active.names)


def how_to_name(package: str) -> str:
    """What to do so that a package may be imported."""
    return (
        f'name it under [tool.regrow] in pyproject.toml (packages = ["{package}"]) and start below that folder, or '
        f"set {VARIABLE}={package}"
    )


def find_packages(environ: Mapping[str, str], folder: Path) -> UserPackages:
    """The packages that are named: by the environment, or else by the project and by installed distributions.

    Args:
        environ: the process' variables.
        folder: the working directory, in or above which the project's `pyproject.toml` lies.

    Raises:
        PackageError: `pyproject.toml` cannot be read, or a name is none.
    """
    project = _nearest_project(folder)
    if VARIABLE in environ:
        given = [n.strip() for n in environ[VARIABLE].split(",") if n.strip()]
        # A folder that is given and empty means that none is needed: the working directory has no say then.
        place = environ.get(PATH_VARIABLE, str(project.parent) if project else "")
        return UserPackages(_checked(given, VARIABLE), str(Path(place).absolute()) if place else "", VARIABLE)
    where = f"[tool.regrow] in {project}"
    own = _project_names(project) if project else ()
    installed = tuple(sorted({e.module for e in entry_points(group=_GROUP)} - set(own)))
    named_in = " or ".join([*([where] if own else []), *([f"the entry points {_GROUP}"] if installed else [])])
    names = (*_checked(own, where), *_checked(installed, f"the entry points {_GROUP}"))
    return UserPackages(names, str(project.parent) if project and own else "", named_in)


def _nearest_project(folder: Path) -> Path | None:
    folder = folder.absolute()
    return next((p / _PROJECT for p in (folder, *folder.parents) if (p / _PROJECT).is_file()), None)


def _project_names(project: Path) -> tuple[str, ...]:
    try:
        tables = tomllib.loads(project.read_bytes().decode())
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise PackageError(f"{project} must be a TOML file, but cannot be read ({reason}); correct it") from error
    tool = tables.get("tool")
    own = tool.get("regrow", {}) if isinstance(tool, dict) else {}
    names = own.get("packages", []) if isinstance(own, dict) else own
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise PackageError(
            f"packages under [tool.regrow] in {project} must be a list of names, but is {names!r}; write packages = "
            '["mylab"]'
        )
    return tuple(dict.fromkeys(names))


def _checked(names: Iterable[str], where: str) -> tuple[str, ...]:
    for name in names:
        parts = name.split(".")
        if not all(p.isidentifier() and not keyword.iskeyword(p) for p in parts) or parts[0] == "regrow":
            raise PackageError(
                f"{where} must name packages as they are imported, other than Regrow's, but names {name!r}; write "
                "for instance mylab"
            )
    return tuple(dict.fromkeys(names))


def load_packages(packages: UserPackages) -> None:
    """Imports the packages and takes them for this process' own. Nothing changes where they are so already.

    Raises:
        PackageError: one is not there, or its import fails.
    """
    global _active
    if packages == _active:
        return
    # At the end: a project's `token.py` must not stand before the standard library's.
    if packages.folder and not all(_is_importable(n.partition(".")[0]) for n in packages.names):
        places = [p for p in (Path(packages.folder), Path(packages.folder, "src")) if p.is_dir()]
        sys.path += [str(p) for p in places if str(p) not in sys.path]
        importlib.invalidate_caches()
    for name in packages.names:
        _import_package(name, packages)
    _active = packages
    register_families(m for name in packages.names for m in modules_named(name, lambda stem: stem == "hf"))


def _received(names: tuple[str, ...], folder: str, named_in: str) -> UserPackages:
    packages = UserPackages(names, folder, named_in)
    load_packages(packages)
    return packages


def _is_importable(top: str) -> bool:
    """Whether a package is found without a project's folder; a bare folder of that name somewhere is none."""
    if top in sys.modules:
        return True
    spec = importlib.util.find_spec(top)
    return spec is not None and spec.origin is not None


def _import_package(name: str, packages: UserPackages) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise _failed(name, error) from error
        looked = f" or in {packages.folder} and its src" if packages.folder else ""
        raise PackageError(
            f"{packages.named_in} must name packages that are there, but {name} is not installed{looked}; correct "
            "the name, or install it"
        ) from error
    except Exception as error:
        raise _failed(name, error) from error
    if not hasattr(module, "__path__"):
        raise PackageError(
            f"{packages.named_in} must name packages, but {name} is the single file {module.__file__}; move it into "
            f"a folder {name} as __init__.py"
        )


def _failed(name: str, error: Exception) -> PackageError:
    reason = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
    return PackageError(
        f"the package {name.partition('.')[0]} must be importable, but importing {name} fails "
        f"({type(error).__name__}: {reason}); correct it"
    )


def modules_named(package: str, wanted: Callable[[str], bool]) -> Iterator[str]:
    """The full names of a loaded package's modules whose own name is wanted, at any depth, in order; none is loaded.

    Args:
        package: its name.
        wanted: called with a module's own name.
    """
    found = set()
    for root in map(Path, sys.modules[package].__path__):
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            if wanted(parts[-1]) and all(p.isidentifier() for p in parts):
                found.add(".".join((package, *parts)))
    yield from sorted(found)


def import_of(name: str) -> ModuleType:
    """A module of a named package.

    Raises:
        PackageError: its import fails.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise _failed(name, error) from error
