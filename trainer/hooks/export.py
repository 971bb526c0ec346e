"""Hugging Face folders while training goes on: made behind it, from steps that are durable already."""

import logging
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import final

from regrow.checkpoint.format.step_name import step_folder_name
from regrow.checkpoint.run.catalog import Catalog
from regrow.checkpoint.run.reader_lock import reading
from regrow.trainer.checkpoint_plans import ExportPlan
from regrow.trainer.export_folder import export_step, exported_steps, remove_leftovers
from regrow.trainer.hook import Hook
from regrow.trainer.hooks.config import ExportHookConfig
from regrow.trainer.loop import Trainer

__all__ = ["ExportHook"]

log = logging.getLogger(__name__)


@final
class ExportHook(Hook):
    """See `ExportHookConfig`. Rank 0 converts in a thread of its own; one step at a time."""

    def __init__(self, config: ExportHookConfig) -> None:
        self._config = config
        # On rank 0, where something is exported.
        self._plan: ExportPlan | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="export")
        self._running: dict[int, Future[None]] = {}

    def before_fit(self, trainer: Trainer) -> None:
        plan = trainer.resources.export
        if plan is None or not trainer.context.is_main:
            return
        self._plan = plan
        remove_leftovers(plan.folder)
        # A kill may have come between a step's commit and the end of its export.
        done = exported_steps(plan.folder)
        for entry in Catalog(plan.checkpoints).entries(plan.lineages):
            if entry.step and entry.step % plan.every_n == 0 and entry.step not in done:
                self._start(plan, entry.step)

    def after_commit(self, trainer: Trainer, step: int) -> None:
        if self._plan is not None and step % self._plan.every_n == 0:
            self._start(self._plan, step)

    def _start(self, plan: ExportPlan, step: int) -> None:
        if step in self._running:
            return
        # From now on, not from when its turn comes: retention must not take the step before.
        held = ExitStack()
        held.enter_context(reading(plan.checkpoints.child(step_folder_name(step))))
        self._running[step] = self._thread.submit(self._export, plan, step, held)

    def _export(self, plan: ExportPlan, step: int, held: ExitStack) -> None:
        # Training has the cores first.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        source = plan.checkpoints.child(step_folder_name(step))
        try:
            out = export_step(source, plan.folder, plan.export, step)
            log.info("exported %s", out)
        except (ValueError, OSError) as error:
            log.warning("step %d was not exported: %s; training goes on", step, error)
        finally:
            held.close()

    def after_fit(self, trainer: Trainer) -> None:
        self._thread.shutdown()

    def close(self, trainer: Trainer) -> None:
        # After an error the next start exports what is missing.
        self._thread.shutdown(wait=False, cancel_futures=True)
