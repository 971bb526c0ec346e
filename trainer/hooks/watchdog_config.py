"""The schema of the watchdog."""

from dataclasses import dataclass
from typing import ClassVar

from regrow.trainer.config import HookConfig

__all__ = ["WatchdogConfig"]


@dataclass(kw_only=True, slots=True)
class WatchdogConfig(HookConfig):
    """Finds steps that hang: says which rank is missing, with the stacks of all, and ends the ranks so that they are
    started again where `launch.max_restarts` or Slurm does so.

    Attributes:
        factor: a part of a step that takes longer than so many median steps hangs.
        min_s: but nothing that takes less than so many seconds.
        abort_after_s: seconds after which the rank has ended, once a hanging step is found.
        warmup: steps of each start that are not watched: they compile, and there is no median yet.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("hook", "watchdog_schema")
    _target_: str = "regrow.trainer.hooks.watchdog.WatchdogHook"
    factor: float = 10.0
    min_s: float = 300.0
    abort_after_s: float = 30.0
    warmup: int = 5
