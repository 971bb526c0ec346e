"""From `_target_` to a class. Importing by name runs code, so only Regrow's packages and named ones are allowed."""

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from regrow.errors import ConfigError
from regrow.launch.config.plugins import active_packages, allowed_roots, how_to_name
from regrow.launch.config.target_names import canonical_target

__all__ = ["ALLOWED", "checking", "construct", "resolve"]

# What a target's name may begin with.
ALLOWED = ("regrow.models.", "regrow.checkpoint.", "regrow.trainer.")

T = TypeVar("T")


def resolve(target: str, field: str, base: type[T]) -> type[T]:
    """The class named by `field`'s `_target_`.

    Args:
        target: the class' full name.
        field: the section of the config that names it.
        base: what the field asks for; the class must be one of its kind.

    Raises:
        ConfigError: outside the allowed packages, not there, or of another kind.
    """
    target = canonical_target(target, active_packages().names)
    found = _import(target, field)
    kind = f"a class that extends {base.__module__}.{base.__qualname__}"
    if not isinstance(found, type):
        raise ConfigError(f"{field}._target_ must name {kind}, but {target} is no class; name another one")
    if not issubclass(found, base):
        parents = ", ".join(f"{c.__module__}.{c.__qualname__}" for c in found.__bases__)
        raise ConfigError(
            f"{field}._target_ must name {kind}, but {target} extends {parents}; name another class, or choose the "
            "section that it belongs to"
        )
    if inspect.isabstract(found):
        missing = ", ".join(n for n, member in inspect.getmembers(found) if _is_abstract(member))
        raise ConfigError(
            f"{field}._target_ must name a class with all methods of {base.__qualname__}, but {target} lacks "
            f"{missing}; add them"
        )
    return found


def _is_abstract(member: object) -> bool:
    return bool(getattr(member, "__isabstractmethod__", False))


def _import(target: str, field: str) -> object:
    if not target.startswith((*ALLOWED, *allowed_roots())):
        raise ConfigError(
            f"{field}._target_ must begin with one of {', '.join((*ALLOWED, *allowed_roots()))}, but is {target}; if "
            f"the package is your own, {how_to_name(target.partition('.')[0])}"
        )
    module, _, name = target.rpartition(".")
    try:
        found: object = getattr(importlib.import_module(module), name)
    except Exception as error:  # a module of the user's own may fail in any way
        raise ConfigError(
            f"{field}._target_ must name a class, but {target} cannot be imported ({type(error).__name__}: {error}); "
            "fix it"
        ) from error
    return found


def construct(target: str, field: str, base: type[T], *arguments: object, **options: object) -> T:
    """An object of the class named by `field`'s `_target_`.

    Args:
        target: the class' full name.
        field: the section of the config that names it.
        base: what the field asks for.
        arguments: the class is called with these, which for most kinds is the section alone.
        options: and with these, by name.

    Raises:
        ConfigError: the class cannot be used, or refuses its config.
    """
    kind: Callable[..., T] = resolve(target, field, base)
    with checking():
        return kind(*arguments, **options)


@contextmanager
def checking() -> Iterator[None]:
    """Takes a ValueError for a refusal, in a block in which a class that a config names looks at that config.

    Users' own classes raise what Python has for a bad value; elsewhere only a ConfigError is a refusal.

    Raises:
        ConfigError: for a ValueError.
    """
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
