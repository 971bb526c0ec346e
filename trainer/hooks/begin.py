"""What a start changes in the run's directory, once its state is loaded."""

from collections.abc import Callable
from typing import final

from regrow.trainer.hook import Hook
from regrow.trainer.hooks.on_main import run_on_main
from regrow.trainer.loop import Trainer

__all__ = ["BeginHook"]


@final
class BeginHook(Hook):
    """TensorPlacement first: the others' `fit_start` finds the run as this start has made it.

    A start that is refused while the state is loaded has then changed nothing.

    Args:
        begin: writes the run's record and config; called by rank 0 alone.
    """

    def __init__(self, begin: Callable[[], None]) -> None:
        self._begin = begin

    def fit_start(self, trainer: Trainer) -> None:
        run_on_main(trainer.context, self._begin)
