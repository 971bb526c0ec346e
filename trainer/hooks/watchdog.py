"""Steps that hang are found, told and ended, so that the ranks are started again."""

import ctypes
import logging
import math
import os
import platform
import secrets
import statistics
import sys
from collections import deque
from collections.abc import Mapping
from typing import Any, final

import torch.distributed as dist

from regrow.checkpoint.processes import process_tag
from regrow.errors import ConfigError
from regrow.torch_compat import flight_record
from regrow.trainer.hook import Hook
from regrow.trainer.hooks.watchdog_config import WatchdogConfig
from regrow.trainer.loop import Trainer
from regrow.trainer.parallel.context import ParallelContext
from regrow.trainer.watch.notes import Member, Notes, clear_old_notes
from regrow.trainer.watch.watcher import Watched, Watcher

__all__ = ["WatchdogHook"]

log = logging.getLogger(__name__)

# Steps that the median is over.
_STEPS = 50
_PR_SET_PTRACER, _ANYBODY = 0x59616D61, ctypes.c_ulong(-1)


@final
class WatchdogHook(Hook):
    """See `WatchdogConfig`. A thread on each rank, which the loop tells nothing and never waits for."""

    def __init__(self, config: WatchdogConfig) -> None:
        _at_least(config.factor, 1.0, "factor", "10")
        _at_least(config.min_s, 0.1, "min_s", "300")
        _at_least(config.abort_after_s, 1.0, "abort_after_s", "30")
        _at_least(config.warmup, 1, "warmup", "5")
        self._config = config
        self._steps = 0
        self._times: deque[float] = deque(maxlen=_STEPS)
        self._limit: float | None = None
        self._watcher: Watcher | None = None

    def before_fit(self, trainer: Trainer) -> None:
        context, config = trainer.context, self._config
        folder = trainer.resources.run_dir / "watchdog"
        _let_others_look()
        members, notes = _meet(trainer, context)
        watched = Watched(
            rank=context.rank,
            members=members,
            folder=folder,
            look=lambda: (trainer.phase, trainer.state.step),
            limit_s=lambda: self._limit,
            min_s=config.min_s,
            abort_after_s=config.abort_after_s,
            failed=trainer.resources.failed,
            record=lambda: flight_record() if context.device.type == "cuda" else None,
        )
        self._watcher = Watcher(watched, notes)
        self._watcher.start()

    def after_metrics(self, trainer: Trainer, row: Mapping[str, Any]) -> None:
        self._steps += 1
        if self._steps <= self._config.warmup or "step_time_s" not in row:
            return
        self._times.append(float(row["step_time_s"]))
        self._limit = max(self._config.min_s, self._config.factor * statistics.median(self._times))

    def close(self, trainer: Trainer) -> None:
        if self._watcher is not None:
            self._watcher.close()


def _at_least(value: float, low: float, name: str, remedy: str) -> None:
    if not (value >= low and math.isfinite(value)):
        raise ConfigError(f"hooks.watchdog.{name} must be at least {low:g}, but is {value:g}; use {remedy}")


def _meet(trainer: Trainer, context: ParallelContext) -> tuple[list[Member], Notes]:
    """Who the ranks are, and the notes of this start, which are there when this returns."""
    folder = trainer.resources.run_dir / "watchdog"
    if context.is_main:
        clear_old_notes(folder)
    token = [secrets.token_hex(4)]
    dist.broadcast_object_list(token, group=context.cpu_group, group_src=0)
    notes = Notes(folder / f"live-{token[0]}", context.rank, context.world_size)
    own = Member(rank=context.rank, host=platform.node(), pid=os.getpid(), tag=process_tag())
    members = [own] * context.world_size
    dist.all_gather_object(members, own, group=context.cpu_group)
    return members, notes


def _let_others_look() -> None:
    """Where the kernel lets only a parent read a process (Yama), the ranks beside this one may too."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _ANYBODY, 0, 0, 0)
