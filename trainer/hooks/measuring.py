"""What hooks that measure between steps share: when it is due, and what a stop leaves undone."""

import logging
from abc import abstractmethod
from collections.abc import Collection

import torch.distributed as dist

from regrow.checkpoint.format.later_metrics import add_later_metrics
from regrow.checkpoint.format.step_name import step_folder_name
from regrow.checkpoint.format.stored_step import is_verified
from regrow.checkpoint.storage.base import Storage
from regrow.trainer.hook import Hook
from regrow.trainer.jsonlines import read_rows, rewrite_rows
from regrow.trainer.loop import Trainer
from regrow.trainer.run_files import METRICS

__all__ = ["MeasuringHook"]

log = logging.getLogger(__name__)


class MeasuringHook(Hook):
    """Measures after some steps and adds to their rows, each once, however the run is stopped and continued."""

    @abstractmethod
    def due(self, trainer: Trainer) -> bool:
        """Whether the step just done is one of those, and there is something to measure."""

    @abstractmethod
    def names(self, trainer: Trainer) -> Collection[str]:
        """Metrics that a step's row has once it was measured."""

    @abstractmethod
    def measure(self, trainer: Trainer) -> dict[str, float] | None:
        """The metrics; None when a rank wants to stop."""

    def before_fit(self, trainer: Trainer) -> None:
        if trainer.state.step > 0 and trainer.stop is None and self.due(trainer):
            self._catch_up(trainer)

    def after_optimizer_step(self, trainer: Trainer) -> None:
        if self.due(trainer):
            found = self.measure(trainer)
            if found is not None:
                trainer.add_metrics(**found)

    def _catch_up(self, trainer: Trainer) -> None:
        """Measures the resumed step where a stop came before that had ended, and mends its row and its checkpoint."""
        path, step, context = trainer.resources.run_dir / METRICS, trainer.state.step, trainer.context
        rows = [r for r in read_rows(path) if r["step"] <= step] if context.is_main else []
        names = self.names(trainer)
        wanted = [bool(rows) and rows[-1]["step"] == step and any(n not in rows[-1] for n in names)]
        dist.broadcast_object_list(wanted, group=context.cpu_group, group_src=0)
        if not wanted[0]:
            return
        found = self.measure(trainer)
        if found is None:
            return
        plan = trainer.resources.checkpoint
        for name, lower_is_better in (plan.tracked if plan is not None else {}).items():
            trainer.state.note_best(name, found.get(name), lower_is_better=lower_is_better)
        if context.is_main:
            rows[-1] |= found
            rewrite_rows(path, rows)
            if plan is not None:
                _keep(plan.folder.child(step_folder_name(step)), found)


def _keep(step: Storage, found: dict[str, float]) -> None:
    """For rules of retention that go by what was measured."""
    try:
        if is_verified(step):
            add_later_metrics(step, found)
    except OSError as error:
        log.warning("what was measured at %s is not kept with it (%s)", step.url, error.strerror or error)
