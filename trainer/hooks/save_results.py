"""What became of the saves: which step is durable, how many failed in a row, whether a stop still has the time."""

import logging
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import final

import torch.distributed as dist

from regrow.checkpoint.errors import CheckpointError, LastSaveError
from regrow.checkpoint.run.catalog import Catalog
from regrow.checkpoint.run.lease import LeaseLostError
from regrow.checkpoint.save.saver import SaveResult
from regrow.trainer.checkpoint_plans import CheckpointPlan
from regrow.trainer.parallel.context import ParallelContext

__all__ = ["SaveResults", "stop_seconds"]

log = logging.getLogger(__name__)


@final
class SaveResults:
    """Keeps the account of a run's saves, and has old steps removed as new ones become durable.

    Args:
        plan: see `CheckpointPlan`.
        context: this rank's place.
        step: that the run goes on from.

    Attributes:
        durable_step: the newest step that is known to be durable.
        error: why the last save failed.
        step_s: how long a step takes.
    """

    def __init__(self, plan: CheckpointPlan, context: ParallelContext, step: int) -> None:
        self.durable_step, self.error, self.step_s = step, "", 0.0
        self._plan, self._context = plan, context
        self._catalog = Catalog(plan.folder, plan.reader_timeout_s)
        self._tidying = ThreadPoolExecutor(1, thread_name_prefix="retention")
        self._failures = 0
        self._save_seconds: deque[float] = deque(maxlen=5)

    def note(self, result: SaveResult) -> bool:
        """Takes a save that has ended into account; all ranks see the same ends, though not at the same step.

        Returns:
            Whether its step is durable.

        Raises:
            LeaseLostError: another writer has taken the folder over.
            CheckpointError: it failed, and the run is to end by that.
        """
        if result.error is not None:
            self._failures += 1
            self.error = result.error
            self._report_failure(result)
            return False
        self._failures = 0
        self.durable_step = result.step
        if self._context.is_main:
            log.info("saved %s, durable after %.2f s", result.url, result.seconds)
            self._check_grace(result.seconds)
            self._tidying.submit(self._prune)
        return True

    def _report_failure(self, result: SaveResult) -> None:
        message = f"step {result.step} was not saved: {result.error}"
        if result.final:
            raise LeaseLostError(message)
        if self._plan.stop_on_error or self._failures >= self._plan.max_failures:
            raise CheckpointError(f"{message}; {self._failures} saves in a row have failed")
        if self._context.is_main:
            log.warning("%s; training goes on and the next due save is tried", message)

    def check_last(self, step: int, *, may_fail: bool) -> None:
        """Whether what was trained is durable: a result that exists nowhere is a failure. Every rank calls it.

        Args:
            step: the last one.
            may_fail: only tells of it, since the run goes on from an earlier step in any case.

        Raises:
            LastSaveError: the last step was to be saved, but was not.
        """
        # Rank 0 commits, so its word counts.
        known: list[tuple[int, str]] = [(self.durable_step, self.error)]
        dist.broadcast_object_list(known, group=self._context.cpu_group, group_src=0)
        durable, problem = known[0]
        if durable >= step:
            return
        message = (
            f"step {step} must be saved at the end, but was not ({problem}); the newest step is "
            f"{durable}: mend the storage and give the same command again, which trains the lost steps once more"
        )
        if not may_fail:
            raise LastSaveError(message)
        if self._context.is_main:
            log.error("%s", message)

    def _check_grace(self, seconds: float) -> None:
        """Says beforehand that a stop will not fit into its grace time, the first time that it is so."""
        fitted = stop_seconds(self._save_seconds, self.step_s) <= self._plan.grace_s
        self._save_seconds.append(seconds)
        needed = stop_seconds(self._save_seconds, self.step_s)
        if fitted and needed > self._plan.grace_s:
            log.warning(
                "a requested stop takes about %.0f s (two steps and a save), but is killed after %.0f s: up to "
                "checkpoint.interval steps would be lost; raise hydra.launcher.grace_s and the partition's grace "
                "time, or lower checkpoint.interval",
                needed,
                self._plan.grace_s,
            )

    def _prune(self) -> None:
        """Retention, beside training: what fails here costs room, not a step."""
        try:
            removed = self._catalog.prune(self._plan.rules, self._plan.lineages)
        except (OSError, CheckpointError) as error:
            log.warning("old steps cannot be removed now: %s", error)
            return
        if removed:
            log.info("removed steps %s", ", ".join(str(s) for s in removed))

    def close(self, *, wait: bool) -> None:
        """Ends the removal of old steps; without `wait` what has not begun is left to the next start."""
        self._tidying.shutdown(wait=wait, cancel_futures=not wait)


def stop_seconds(save_seconds: Iterable[float], step_s: float) -> float:
    """How long a requested stop takes: the step under way, the one in which ranks agree, and the slowest of
    the last saves.
    """
    return 2 * step_s + max(save_seconds, default=0.0)
