"""Which Regrow this is. No torch."""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["own_version"]


def own_version() -> str:
    """The installed package's version."""
    try:
        return version("regrow")
    except PackageNotFoundError:
        return "uninstalled"
