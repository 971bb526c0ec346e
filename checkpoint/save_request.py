"""What a `Checkpointer` is asked to save: checked and copied in the call, so that nothing fails or changes later."""

import json
import operator
from collections.abc import Mapping
from typing import Any, SupportsFloat, SupportsIndex

from torch import Tensor

from regrow.checkpoint.documents import is_flat_name

__all__ = ["check_tensors", "checked_metrics", "checked_state", "checked_step"]


def checked_step(step: SupportsIndex, last: int | None) -> int:
    """The number of a step to save; numpy's and torch's whole numbers are such numbers, too.

    Args:
        step: as it was given.
        last: that of the step before; None where there is none.

    Raises:
        ValueError: it is no whole number, below 0, or not above the last.
    """
    try:
        number = operator.index(step)
    except TypeError:
        raise ValueError(f"step must be a whole number, but is {step!r}; count steps with int") from None
    if number < 0 or (last is not None and number <= last):
        raise ValueError(
            f"step must be above the last step ({last}), but is {number}; count on from there, or load an older "
            "step first"
        )
    return number


def check_tensors(tensors: Mapping[str, object]) -> None:
    """Raises ValueError where something else than a tensor, or a name that none can have, is among the tensors."""
    wrong = next((n for n, t in tensors.items() if not (isinstance(t, Tensor) and _is_name(n))), None)
    if wrong is not None:
        raise ValueError(
            f"tensors must map names of one line to tensors, but {str(wrong)[:80]!r} does not; use split_state to "
            "take the tensors out of a nested state"
        )


def checked_state(state: Mapping[str, Any] | None) -> dict[str, Any]:
    """A copy of a state, as it will be loaded again.

    Raises:
        ValueError: JSON cannot hold it.
    """
    try:
        copied: dict[str, Any] = json.loads(json.dumps(dict(state or {}), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"state must hold what JSON can, but does not ({error}); use split_state to take the tensors out"
        ) from None
    return copied


def checked_metrics(metrics: Mapping[str, SupportsFloat] | None) -> dict[str, float]:
    """The metrics as numbers, from whatever numpy or torch gave for one.

    Raises:
        ValueError: a value is no number, or a name no text.
    """
    return {_metric_name(name): _metric(name, value) for name, value in (metrics or {}).items()}


def _is_name(name: object) -> bool:
    return isinstance(name, str) and is_flat_name(name)


def _metric_name(name: object) -> str:
    if not isinstance(name, str):
        raise ValueError(f"metrics must be named by text, but one is named {name!r}; use its str")
    return name


def _metric(name: str, value: SupportsFloat) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise ValueError(
            f"metrics must be numbers, but {name} is a {type(value).__name__} that float() does not take; give one "
            "number"
        ) from None
