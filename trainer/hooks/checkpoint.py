"""When the run's state is saved; the bytes are `checkpoint`'s business, and loading is `regrow.trainer.restore`'s."""

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch.distributed as dist

from regrow.checkpoint.config import WhenBusy
from regrow.checkpoint.errors import CheckpointError, LastSaveError
from regrow.checkpoint.format.manifest import Manifest
from regrow.checkpoint.policy.save import SaveContext, save_reasons
from regrow.checkpoint.save.saver import SaveResult, StepSaver
from regrow.trainer.checkpoint_plans import CheckpointPlan
from regrow.trainer.export_folder import exported_steps
from regrow.trainer.hook import Hook
from regrow.trainer.hooks.config import CheckpointHookConfig
from regrow.trainer.hooks.last_save import cast_weights, save_in_hf
from regrow.trainer.hooks.on_main import run_on_main
from regrow.trainer.hooks.save_results import SaveResults
from regrow.trainer.loop import StopReason, Trainer
from regrow.trainer.named_tensors import full_state, model_tensors
from regrow.trainer.reduction import Slot

__all__ = ["CheckpointHook"]

log = logging.getLogger(__name__)


@dataclasses.dataclass(kw_only=True, slots=True)
class _Saves:
    """A run's saves.

    Attributes:
        plan: see `CheckpointPlan`.
        saver: makes them.
        results: what became of them.
        clock: when this rank's last one began, as `time.monotonic` has it.
        busy: whether one of this rank's was being written when the last step ended.
        saved_step: the newest step of which a save was begun.
        ended_step: the last step, once its save has been looked at.
        seconds_since_save: rank 0's clock, as all ranks know it one step late.
        saving: how many ranks were writing one step ago.
    """

    plan: CheckpointPlan
    saver: StepSaver
    results: SaveResults
    clock: float
    busy: bool = False
    saved_step: int
    ended_step: int | None = None
    seconds_since_save: Slot
    saving: Slot


@final
class CheckpointHook(Hook):
    """See `CheckpointHookConfig`. Snapshots at the end of steps, and lets the others know what became durable."""

    def __init__(self, config: CheckpointHookConfig) -> None:
        self._config = config
        self._made: _Saves | None = None

    @property
    def _saves(self) -> _Saves:
        assert self._made is not None, "before_fit comes first"
        return self._made

    def before_fit(self, trainer: Trainer) -> None:
        plan, context, step = trainer.resources.checkpoint, trainer.context, trainer.state.step
        assert plan is not None, "refused before any rank starts"
        # The run's record tells of this start by now (an earlier hook's): only then is anything moved.
        if trainer.restorer is not None:
            run_on_main(context, trainer.restorer.set_aside_unused)
        self._made = saves = _Saves(
            plan=plan,
            saver=StepSaver(plan.folder, plan.mode, context.device, context.cpu_group, plan.saver, plan.progress),
            results=SaveResults(plan, context, step),
            clock=time.monotonic(),
            saved_step=step,
            # Rank 0's clock decides for all.
            seconds_since_save=trainer.reduction.sum(
                "seconds_since_save", lambda: time.monotonic() - saves.clock if context.is_main else 0.0
            ),
            saving=trainer.reduction.sum("saving", lambda: float(saves.busy)),
        )
        if plan.policies and step < trainer.options.steps:
            saves.saver.prepare(*full_state(trainer.engine, trainer.optimizer, trainer.state))
        saves.clock = time.monotonic()
        last = plan.last
        if last.export is not None and step >= trainer.options.steps and step not in exported_steps(last.folder):
            # The steps are done, but were saved in full: a Hugging Face folder was asked for since.
            self._save_last(trainer)
            if step not in exported_steps(last.folder):
                raise LastSaveError(
                    f"step {step} must be saved in Hugging Face's format, but was not ({saves.results.error}); mend "
                    "the storage and give the same command again"
                )

    def before_optimizer_step(self, trainer: Trainer) -> None:
        self._saves.saver.wait_staged()

    def after_metrics(self, trainer: Trainer, row: Mapping[str, Any]) -> None:
        self._saves.results.step_s = float(row.get("step_time_s", 0.0))

    def after_step(self, trainer: Trainer) -> None:
        self._handle(trainer, self._saves.saver.poll())
        self._save_if_due(trainer)
        self._saves.busy = self._saves.saver.is_busy

    def after_last_step(self, trainer: Trainer) -> None:
        saves, step = self._saves, trainer.state.step
        # Where the ranks agreed to stop while they waited for data, the last step has ended without knowing.
        if trainer.stop is not None and step > saves.saved_step and step != saves.ended_step:
            self._save_if_due(trainer)
        self._handle(trainer, saves.saver.wait())
        if saves.plan.policies:
            # A run that was preempted goes on from the step before in any case.
            preempted = trainer.stop is StopReason.preempted and step < trainer.options.steps
            saves.results.check_last(step, may_fail=preempted)

    def after_fit(self, trainer: Trainer) -> None:
        self._saves.saver.close()
        self._saves.results.close(wait=True)

    def close(self, trainer: Trainer) -> None:
        # Other ranks may be gone: what they have not written is not waited for.
        if self._made is not None:
            self._made.saver.close(wait=False)
            self._made.results.close(wait=False)

    def _save_if_due(self, trainer: Trainer) -> None:
        """Saves the step just done where a policy asks for it."""
        saves, state, best = self._saves, trainer.state, dict(trainer.state.best)
        for name, lower in saves.plan.tracked.items():
            state.note_best(name, trainer.measured.get(name), lower_is_better=lower)
        stopping, last_step = trainer.stop is not None, trainer.options.steps
        context = SaveContext(
            step=state.step,
            last_step=last_step,
            stopping=stopping,
            seconds_since_save=saves.seconds_since_save.value,
            metrics=trainer.measured,
            best=best,
        )
        reasons, ending = save_reasons(saves.plan.policies, context), stopping or state.step >= last_step
        if ending:
            saves.ended_step = state.step
        if reasons and saves.saving.value > 0 and saves.plan.when_busy is WhenBusy.skip and not ending:
            if trainer.context.is_main:
                log.info("step %d is not saved: the save before it is still being written", state.step)
        elif reasons and state.step >= last_step and not saves.plan.last.is_full:
            self._save_last(trainer)
        elif reasons:
            self._save(trainer, reasons)

    def _save(self, trainer: Trainer, reasons: Sequence[str]) -> None:
        trainer.flush()
        saves, step = self._saves, trainer.state.step
        if not self._rows_are_durable(trainer, step):
            return
        manifest = self._manifest(trainer)
        tensors, owner_ranks = full_state(trainer.engine, trainer.optimizer, trainer.state)
        started = time.perf_counter()
        results = saves.saver.save(tensors, manifest, owner_ranks)
        if trainer.context.is_main:
            log.info("saving step %d (%s): %.1f ms", step, ", ".join(reasons), (time.perf_counter() - started) * 1e3)
        saves.clock, saves.saved_step = time.monotonic(), step
        # Known at once, and not one step late.
        saves.seconds_since_save.value = 0.0
        self._handle(trainer, results)

    def _manifest(self, trainer: Trainer) -> Manifest:
        """What is known of the step just done."""
        plan = self._saves.plan
        return Manifest(
            step=trainer.state.step,
            lineage=plan.lineages[-1].id,
            train_state=trainer.state.as_json(),
            metrics=dict(trainer.measured),
            layout=trainer.context.layout.as_dict(),
            **plan.labels,
        )

    def _save_last(self, trainer: Trainer) -> None:
        """The weights alone; in full where that would lose a value, which ends the run with an error."""
        trainer.flush()
        saves, step = self._saves, trainer.state.step
        last = saves.plan.last
        self._handle(trainer, saves.saver.wait())
        if not self._rows_are_durable(trainer, step):
            return
        saves.saved_step = step
        manifest = dataclasses.replace(self._manifest(trainer), kind="model")
        try:
            tensors = cast_weights(model_tensors(trainer.model), last.dtype, trainer.context)
        except CheckpointError as error:
            self._save(trainer, ["in full"])
            self._handle(trainer, saves.saver.wait())
            raise CheckpointError(f"{error} (step {step} was saved in full)") from error
        owner_ranks = trainer.engine.owner_ranks(list(tensors))
        if last.export is not None:
            try:
                save_in_hf(tensors, manifest, last, last.export, trainer.context, owner_ranks)
            except OSError as error:
                saves.results.error = f"{error.strerror or error} ({last.folder})"
                raise LastSaveError(
                    f"step {step} must be saved in Hugging Face's format, but was not ({saves.results.error}); mend "
                    "the storage and give the same command again"
                ) from error
            saves.results.durable_step = step
            return
        self._handle(trainer, saves.saver.save(tensors, manifest, owner_ranks))
        saves.saver.wait_staged()

    def _rows_are_durable(self, trainer: Trainer, step: int) -> bool:
        """A commit waits for the rows up to its step; where the disk does not take them, nothing is saved."""
        problem: str | None = None
        try:
            for hook in trainer.hooks:
                hook.before_commit(trainer, step)
        except OSError as error:
            problem = f"its rows cannot be written ({error.strerror or error})"
        problems: list[str | None] = [None] * trainer.context.world_size
        dist.all_gather_object(problems, problem, group=trainer.context.cpu_group)
        found = next((p for p in problems if p is not None), None)
        if found is not None:
            self._handle(trainer, [SaveResult(step=step, url=None, error=found, seconds=0.0)])
        return found is None

    def _handle(self, trainer: Trainer, results: Sequence[SaveResult]) -> None:
        """Tells the hooks of saves that have ended."""
        for result in results:
            if self._saves.results.note(result):
                for hook in trainer.hooks:
                    hook.after_commit(trainer, result.step)
