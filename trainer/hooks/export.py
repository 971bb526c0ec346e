"""Hugging Face folders while training goes on: made behind it, from steps that are durable already."""

import dataclasses
import logging
import os
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import final

from regrow.checkpoint.files import fsync_folder, naming
from regrow.checkpoint.format.step_name import parse_step_name, step_folder_name
from regrow.checkpoint.load.open_source import open_source
from regrow.checkpoint.policy.lineage import Lineage
from regrow.checkpoint.run.catalog import Catalog
from regrow.checkpoint.run.reader_lock import reading
from regrow.checkpoint.storage.base import Storage
from regrow.trainer.hf_folder import HfExport, export_hf
from regrow.trainer.hook import Hook
from regrow.trainer.loop import Trainer

__all__ = ["ExportHook", "ExportPlan", "export_step", "exported_steps"]

log = logging.getLogger(__name__)

# Part of every complete one.
_CONFIG = "config.json"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExportPlan:
    """What the hook is told.

    Attributes:
        every_n: steps between exports.
        checkpoints: the run's checkpoint folder.
        folder: receives `step-N` folders.
        export: what goes into them beside the weights.
        lineages: the run's.
    """

    every_n: int
    checkpoints: Storage
    folder: Path
    export: HfExport
    lineages: Sequence[Lineage]


def exported_steps(folder: Path) -> list[int]:
    """The steps of the complete folders in `<run>/export`, ascending."""
    if not folder.is_dir():
        return []
    found = [(parse_step_name(p.name), p) for p in folder.iterdir()]
    return sorted(step for step, path in found if step is not None and (path / _CONFIG).is_file())


def export_step(checkpoint: Storage | str, folder: Path, export: HfExport, step: int) -> Path:
    """Makes `folder/step-N` from a step; one that is there from an earlier try or line of steps is replaced.

    Raises:
        ValueError: one sentence.
    """
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / step_folder_name(step)
    fresh = folder / f".{out.name}.new"
    shutil.rmtree(fresh, ignore_errors=True)
    with open_source(checkpoint) as source:
        export_hf(source, fresh, export, threads=1)
    if out.exists():
        old = folder / f".{out.name}.old"
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
        fresh.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    else:
        fresh.rename(out)
    with naming(folder):
        fsync_folder(folder)
    return out


def remove_leftovers(folder: Path) -> None:
    """What a killed export left."""
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name.startswith(".") and path.is_dir():
                shutil.rmtree(path, ignore_errors=True)


@final
class ExportHook(Hook):
    """Rank 0 converts every n-th committed step in a thread of its own; one at a time."""

    def __init__(self, plan: ExportPlan) -> None:
        self._plan = plan
        self._thread: ThreadPoolExecutor | None = None
        self._running: dict[int, Future[None]] = {}

    def fit_start(self, trainer: Trainer) -> None:
        if not trainer.context.is_main:
            return
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="export")
        remove_leftovers(self._plan.folder)
        # A kill may have come between a step's commit and the end of its export.
        done = exported_steps(self._plan.folder)
        for entry in Catalog(self._plan.checkpoints).entries(self._plan.lineages):
            if entry.step and entry.step % self._plan.every_n == 0 and entry.step not in done:
                self._start(entry.step)

    def on_committed(self, trainer: Trainer, step: int) -> None:
        if trainer.context.is_main and step % self._plan.every_n == 0:
            self._start(step)

    def _start(self, step: int) -> None:
        if self._thread is None or step in self._running:
            return
        # From now on, not from when its turn comes: retention must not take the step before.
        held = ExitStack()
        held.enter_context(reading(self._plan.checkpoints.child(step_folder_name(step))))
        self._running[step] = self._thread.submit(self._export, step, held)

    def _export(self, step: int, held: ExitStack) -> None:
        # Training has the cores first.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        source = self._plan.checkpoints.child(step_folder_name(step))
        try:
            out = export_step(source, self._plan.folder, self._plan.export, step)
            log.info("exported %s", out)
        except (ValueError, OSError) as error:
            log.warning("step %d was not exported: %s; training goes on", step, error)
        finally:
            held.close()

    def fit_end(self, trainer: Trainer) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
