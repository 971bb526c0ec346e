"""What a start changes in the run's directory, once its state is loaded."""

from typing import final

from regrow.trainer.hook import Hook
from regrow.trainer.hooks.config import BeginConfig
from regrow.trainer.hooks.on_main import run_on_main
from regrow.trainer.loop import Trainer

__all__ = ["BeginHook"]


@final
class BeginHook(Hook):
    """See `BeginConfig`. First: the others' `before_fit` finds the run as this start has made it.

    A start that is refused while the state is loaded has then changed nothing.
    """

    def __init__(self, config: BeginConfig) -> None:
        self._config = config

    def before_fit(self, trainer: Trainer) -> None:
        run_on_main(trainer.context, trainer.resources.begin)
