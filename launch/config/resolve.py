"""From `_target_` to a class. Importing by name runs code, so only Regrow's packages and named ones are allowed."""

import importlib
from typing import Any

from regrow.launch.config.plugins import active_packages, allowed_roots, how_to_name
from regrow.launch.config.target_names import canonical_target

__all__ = ["ALLOWED", "resolve_target"]

ALLOWED = ("regrow.models.", "regrow.checkpoint.", "regrow.trainer.")


def resolve_target(target: str, field: str) -> Any:
    """The class named by `field`'s `_target_`.

    Raises:
        ValueError: outside the allowed packages, or not there.
    """
    target = canonical_target(target, active_packages().names)
    if not target.startswith((*ALLOWED, *allowed_roots())):
        raise ValueError(
            f"{field}._target_ must begin with one of {', '.join((*ALLOWED, *allowed_roots()))}, but is {target}; if "
            f"the package is your own, {how_to_name(target.partition('.')[0])}"
        )
    module, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{field}._target_ must name a class, but {target} cannot be imported ({error}); fix it"
        ) from error
