"""Loading is verifying: all ranks continue with a step, or none does and all fall back to the one before."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch.distributed as dist

from regrow.checkpoint.errors import CheckpointError, DamagedStepError
from regrow.checkpoint.ranks import gather_values, on_first_rank, rank_and_count
from regrow.checkpoint.storage.base import Storage

__all__ = ["AgreedLoad", "load_agreed", "storage_errors"]

log = logging.getLogger(__name__)

Choice = TypeVar("Choice")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class AgreedLoad(Generic[Choice, Result]):
    """What all ranks have loaded.

    Attributes:
        choice: where it comes from.
        result: what loading it gave on this rank.
        damaged: the steps that were tried before, with what is wrong with each.
    """

    choice: Choice
    result: Result
    damaged: dict[int, str]


def load_agreed(
    choose: Callable[[Mapping[int, str]], Choice],
    load: Callable[[Choice], Result],
    replaceable: Callable[[Choice], int | None],
    group: dist.ProcessGroup | None,
    before_retry: Callable[[], None] = lambda: None,
) -> AgreedLoad[Choice, Result]:
    """Loads what the first rank chooses on all ranks; another choice where a rank finds it damaged.

    Args:
        choose: called on the first rank, given the damaged steps; the choice must be one that can be pickled.
        load: called on every rank; raises CheckpointError.
        replaceable: the number of the chosen step, where another may be taken in its place.
        group: of all ranks, on the CPU; None for one process.
        before_retry: called on every rank before another choice is loaded.

    Raises:
        CheckpointError: the same on all ranks: nothing can be chosen, or a choice that may not be replaced cannot be
            loaded.
    """
    damaged: dict[int, str] = {}
    while True:
        choice = on_first_rank(lambda: choose(damaged), group, CheckpointError)
        result, error = _attempt(load, choice)
        problem = next((e for e in gather_values(error, group) if e is not None), None)
        if problem is None:
            assert result is not None
            return AgreedLoad(choice=choice, result=result[0], damaged=damaged)
        step = replaceable(choice)
        if not isinstance(problem, DamagedStepError) or step is None:
            raise problem
        damaged[step] = str(problem)
        if rank_and_count(group)[0] == 0:
            log.warning("%s", problem)
        before_retry()


def _attempt(load: Callable[[Choice], Result], choice: Choice) -> tuple[tuple[Result] | None, CheckpointError | None]:
    try:
        return (load(choice),), None
    except CheckpointError as error:
        # Without its cause, which may not travel to the other ranks.
        kind = DamagedStepError if isinstance(error, DamagedStepError) else CheckpointError
        return None, kind(str(error))


@contextmanager
def storage_errors(storage: Storage) -> Iterator[None]:
    """Turns what a storage refuses while a step is read into the error that says what it means.

    Raises:
        CheckpointError: a remote storage failed, which says nothing of the step.
        DamagedStepError: a local one did: what cannot be read is as good as damaged.
    """
    try:
        yield
    except OSError as error:
        if storage.is_remote:
            raise CheckpointError(
                f"{storage.url} cannot be read ({error}); check the storage and try again"
            ) from error
        raise DamagedStepError(f"{storage.url} cannot be read ({error}); use another step") from error
