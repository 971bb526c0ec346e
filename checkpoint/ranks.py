"""How ranks agree: small Python values over a group on the CPU, or nothing to agree on in one process."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

__all__ = ["broadcast_value", "gather_values", "on_first_rank", "rank_and_count"]

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


def on_first_rank(act: Callable[[], T], group: dist.ProcessGroup | None, *errors: type[Exception]) -> T:
    """What `act` gives on the first rank, on all ranks.

    Args:
        act: called on the first rank alone.
        group: of all ranks, on the CPU; None for one process.
        errors: of these kinds are raised on all ranks.
    """
    outcome: tuple[T | None, Exception | None] = (None, None)
    if rank_and_count(group)[0] == 0:
        try:
            outcome = (act(), None)
        except errors as error:
            outcome = (None, error)
    value, failure = broadcast_value(outcome, group)
    if failure is not None:
        raise failure
    return value  # type: ignore[return-value]
