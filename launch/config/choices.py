"""The choices of every group, read from their YAML files: Regrow's and the user's own packages'. Needs no Hydra."""

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

__all__ = ["Choice", "conf_folders", "read_choice", "read_choices"]

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_SCHEMA = "_schema"


class _Loader(_LOADER):  # type: ignore[misc]
    """YAML as OmegaConf reads it: 1e-3 is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+\Z"),
    list("-+0123456789"),
)


@dataclass(frozen=True, slots=True)
class Choice:
    """One YAML file of a group.

    Attributes:
        group: for instance `model`; empty for the root config.
        name: as it is chosen.
        comment: the sentence at the top of the file.
        file: below the folder that holds `conf`, for people.
        schema: the name of the schema in its group; empty where it has none.
        bases: other choices of its group that it goes on from.
        adds: what else its defaults bring: (`group@place` or group, choice).
        values: what it sets.
        is_global: its values stand at the root of the config.
    """

    group: str
    name: str
    comment: str
    file: str
    schema: str = ""
    bases: tuple[str, ...] = ()
    adds: tuple[tuple[str, str], ...] = ()
    values: dict[str, Any] = field(default_factory=dict)
    is_global: bool = False


def conf_folders(packages: Iterable[str]) -> list[Path]:
    """The folders of YAML files of packages that are loaded.

    Args:
        packages: their names.
    """
    return [
        folder for n in packages for p in sys.modules[n].__path__ if (folder := Path(p, "conf").absolute()).is_dir()
    ]


def read_choices(folders: Iterable[Path]) -> dict[str, dict[str, Choice]]:
    """All choices by group, both in order of their names; a file that cannot be read is left out.

    Args:
        folders: each holds a folder per group.
    """
    found: dict[str, dict[str, Choice]] = {}
    for folder in folders:
        for path in sorted([*folder.rglob("*.yaml"), *folder.rglob("*.yml")]):
            choice = read_choice(path, folder)
            if choice is not None:
                found.setdefault(choice.group, {})[choice.name] = choice
    return {group: dict(sorted(choices.items())) for group, choices in sorted(found.items())}


def read_choice(path: Path, folder: Path) -> Choice | None:
    """One choice; None where its file is not there or cannot be read.

    Args:
        path: of the file.
        folder: holds a folder per group, or several levels of them.
    """
    group, file = path.parent.relative_to(folder).as_posix().removeprefix("."), path.relative_to(folder.parent)
    try:
        text = path.read_text()
        values = yaml.load(text, _Loader) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return None  # Hydra says what is wrong with it when it is chosen
    if not isinstance(values, dict):
        return None
    defaults = values.pop("defaults", None)
    entries = defaults if isinstance(defaults, list) else []
    own = [e for e in entries if isinstance(e, str) and e != "_self_"]
    return Choice(
        group=group,
        name=path.stem,
        comment=_comment(text),
        file=file.as_posix(),
        schema=next((e for e in own if e.endswith(_SCHEMA)), ""),
        bases=tuple(e for e in own if not e.endswith(_SCHEMA)),
        adds=tuple((str(k), str(v)) for e in entries if isinstance(e, dict) for k, v in e.items() if v is not None),
        values={str(k): v for k, v in values.items()},
        is_global="@package _global_" in text,
    )


def _comment(text: str) -> str:
    """The comment lines at the top, without Hydra's own."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line.removeprefix("#").strip())
    return " ".join(lines)
