"""How long a start took, from the process' beginning to the end of its first step, split into its parts."""

import logging
from collections.abc import Mapping
from typing import Any, final

from regrow.trainer.hook import Hook
from regrow.trainer.hooks.config import StartupConfig
from regrow.trainer.loop import Trainer
from regrow.trainer.start_marks import mark, take_parts

__all__ = ["StartupHook"]

log = logging.getLogger(__name__)


@final
class StartupHook(Hook):
    """See `StartupConfig`. Last, so that its marks come after the others' work."""

    def __init__(self, config: StartupConfig) -> None:
        self._config = config
        self._done = False

    def before_fit(self, trainer: Trainer) -> None:
        mark("state")

    def after_metrics(self, trainer: Trainer, row: Mapping[str, Any]) -> None:
        if self._done or not trainer.context.is_main:
            return
        self._done = True
        mark("first step")
        found = take_parts()
        split = ", ".join(f"{name} {seconds:.2f}" for name, seconds in found.items())
        log.info("first step %.2f s after the start: %s", sum(found.values()), split)
