"""`hf` modules of families outside of `models`, by name: packages of a user's own bring some."""

from collections.abc import Iterable

__all__ = ["family_modules", "register_families"]

_MODULES: list[str] = []


def register_families(modules: Iterable[str]) -> None:
    """Takes modules up by their full names; again is the same as once."""
    _MODULES.extend(name for name in modules if name not in _MODULES)


def family_modules() -> tuple[str, ...]:
    """All that were taken up, in order."""
    return tuple(_MODULES)
