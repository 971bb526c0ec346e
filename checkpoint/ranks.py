"""How ranks agree: small Python values over a group on the CPU, or nothing to agree on in one process."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

__all__ = ["broadcast_value", "gather_values", "on_every_rank", "on_first_rank", "rank_and_count"]

T = TypeVar("T")


def rank_and_count(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """This rank's number and how many there are; (0, 1) without a group."""
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def broadcast_value(value: T, group: dist.ProcessGroup | None) -> T:
    """The first rank's value on all ranks."""
    if group is None:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, group=group, group_src=0)
    found: T = box[0]
    return found


def gather_values(value: T, group: dist.ProcessGroup | None) -> list[T]:
    """Every rank's value, on all ranks, by rank."""
    if group is None:
        return [value]
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def on_every_rank(act: Callable[[], T], group: dist.ProcessGroup | None, *errors: type[Exception]) -> T:
    """What `act` gives on this rank, where it succeeds on all ranks; else all raise the first failed rank's error.

    Args:
        act: called on every rank; may give each another value.
        group: of all ranks, on the CPU; None for one process.
        errors: of these kinds are raised on all ranks.
    """
    value, failure = _outcome(act, errors)
    first = next((e for e in gather_values(failure, group) if e is not None), None)
    if first is not None:
        raise first
    return value  # type: ignore[return-value]


def on_first_rank(act: Callable[[], T], group: dist.ProcessGroup | None, *errors: type[Exception]) -> T:
    """What `act` gives on the first rank, on all ranks.

    Args:
        act: called on the first rank alone.
        group: of all ranks, on the CPU; None for one process.
        errors: of these kinds are raised on all ranks.
    """
    outcome: tuple[T | None, Exception | None] = (None, None)
    if rank_and_count(group)[0] == 0:
        outcome = _outcome(act, errors)
    value, failure = broadcast_value(outcome, group)
    if failure is not None:
        raise failure
    return value  # type: ignore[return-value]


def _outcome(act: Callable[[], T], errors: tuple[type[Exception], ...]) -> tuple[T | None, Exception | None]:
    try:
        return act(), None
    except errors as error:
        return None, error
