"""Which Regrow this is, and what it runs with. Standard library only."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["own_version", "software_versions"]


def own_version() -> str:
    """The installed package's version."""
    return _version_of("regrow")


def software_versions() -> dict[str, str]:
    """What a run or a checkpoint was made with."""
    versions = {"regrow": own_version(), "torch": _version_of("torch"), "python": platform.python_version()}
    revision = _git_revision()
    return {**versions, "git": revision} if revision else versions


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "uninstalled"


def _git_revision() -> str | None:
    """Of the sources that run, None where they are not a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
