"""Any nested state (`state_dict()` of a model, an optimizer, a scheduler) as flat tensors and plain values."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

__all__ = ["join_state", "named_tensors", "split_state"]

# The keys of a mapping that stands for what JSON does not have.
_TENSOR, _TUPLE, _PAIRS, _NUMBER = "__tensor__", "__tuple__", "__pairs__", "__number__"
_MARKS = {_TENSOR, _TUPLE, _PAIRS, _NUMBER}


def split_state(state: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Takes the tensors out of a nested state.

    Args:
        state: mappings, lists, tuples, tensors, numbers, text, None, nested as deep as wanted.
        prefix: of the tensors' names.

    Returns:
        The tensors by flat name (`model.layers.0.weight`), and the rest as JSON can hold it, for `join_state`.

    Raises:
        ValueError: it holds something else, or two tensors would get one name.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, {key: _split(value, f"{prefix}{key}", tensors) for key, value in state.items()}


def _split(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        if name in tensors:
            raise ValueError(f"state must give each tensor a name of its own, but two are called {name}; rename one")
        tensors[name] = value.detach()
        return {_TENSOR: name}
    if isinstance(value, float) and not math.isfinite(value):
        # Which JSON does not have.
        return {_NUMBER: str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return _split_mapping(value, name, tensors)
    if isinstance(value, list | tuple):
        items = [_split(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    raise ValueError(
        f"state must be made of tensors, numbers, text, None, lists, tuples and mappings, but {name} is a "
        f"{type(value).__name__}; leave it out, or turn it into one of these"
    )


def _split_mapping(value: Mapping[Any, Any], name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if all(isinstance(key, str) for key in value) and not _MARKS & set(value):
        return {key: _split(item, f"{name}.{key}", tensors) for key, item in value.items()}
    # Keys that are numbers stay numbers.
    pairs = [[_split(key, name, {}), _split(item, f"{name}.{key}", tensors)] for key, item in value.items()]
    return {_PAIRS: pairs}


def join_state(plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The nested state again.

    Args:
        plain: the second part of what `split_state` gave.
        tensors: the first part, or others under the same names.

    Raises:
        KeyError: a tensor is not there.
    """
    return {key: _join(value, tensors) for key, value in plain.items()}


def _join(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_join(item, tensors) for item in value]
    if not isinstance(value, Mapping):
        return value
    if len(value) == 1:
        ((mark, inner),) = value.items()
        if mark == _TENSOR:
            return tensors[inner]
        if mark == _NUMBER:
            return float(inner)
        if mark == _TUPLE:
            return tuple(_join(item, tensors) for item in inner)
        if mark == _PAIRS:
            return {_join(key, tensors): _join(item, tensors) for key, item in inner}
    return {key: _join(item, tensors) for key, item in value.items()}


def named_tensors(plain: Any) -> Iterator[str]:
    """The names of the tensors that `join_state` would put into a state; of other states, none."""
    if isinstance(plain, list):
        for item in plain:
            yield from named_tensors(item)
    elif isinstance(plain, Mapping):
        name = plain.get(_TENSOR)
        if len(plain) == 1 and isinstance(name, str):
            yield name
        else:
            yield from named_tensors(list(plain.values()))
