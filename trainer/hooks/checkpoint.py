"""Where the run's state comes from and when it is saved; the bytes are `checkpoint`'s business."""

import dataclasses
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from regrow.checkpoint.config import AsyncMode, WhenBusy
from regrow.checkpoint.documents import DocumentError
from regrow.checkpoint.errors import CheckpointError, DamagedStepError, LastSaveError
from regrow.checkpoint.format.manifest import Manifest, read_manifest
from regrow.checkpoint.format.tensor_source import TensorSource
from regrow.checkpoint.load.initial_load import LoadRules, load_from, pin_source, stored_step
from regrow.checkpoint.load.loading import is_verified, load_tensors
from regrow.checkpoint.policy.lineage import Lineage, StartKind, StartPoint, start_point
from regrow.checkpoint.policy.retention import RetentionRule
from regrow.checkpoint.policy.save import SaveContext, SavePolicy, save_reasons
from regrow.checkpoint.run.catalog import Catalog
from regrow.checkpoint.run.lease import LeaseLostError
from regrow.checkpoint.run.reader_lock import reading
from regrow.checkpoint.save.saver import SaveResult, SaverOptions, StepSaver
from regrow.checkpoint.storage.base import Storage
from regrow.checkpoint.storage.opening import open_storage
from regrow.trainer.hook import Hook
from regrow.trainer.hooks.export import exported_steps
from regrow.trainer.hooks.last_save import LastSave, cast_weights, save_in_hf
from regrow.trainer.hooks.on_main import run_on_main
from regrow.trainer.loop import StopReason, Trainer
from regrow.trainer.reduction import Slot
from regrow.trainer.state import TrainState

__all__ = ["CheckpointHook", "CheckpointPlan", "stop_seconds"]

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointPlan:
    """What the hook is told.

    Attributes:
        folder: holds the steps.
        policies: reasons to save; none of them: never save.
        storage_options: for a URL to start from.
        rules: reasons to keep a step.
        lineages: the run's, the newest last.
        tracked: metrics whose best value is remembered, and whether lower is better.
        schedule_total: the steps of a schedule that begins on resume; None: up to the run's end.
        stretched: by `run.extend`: the step at which a schedule began, the step after which it was stretched, and the
            steps that it spans since; oldest first.
        labels: written into each manifest: `data_fingerprint`, `config_hash`, `versions`.
        mode: how a save overlaps training.
        saver: how saves are made.
        when_busy: what becomes of a save that is due during another.
        reader_timeout_s: after which a silent reader of a step does not keep it any more.
        stop_on_error: a save that fails ends the run.
        max_failures: so many in a row end it in any case.
        grace_s: between a request to stop and the kill; infinite where nobody kills.
        last: what the last step's save is.
        initial: how names and shapes may differ where the run starts from weights elsewhere.
        open_initial: opens such weights under our names, given their path or URL.
        parameters: the names of all of the model's parameters, on whichever rank.
    """

    folder: Storage
    storage_options: dict[str, str]
    policies: Sequence[SavePolicy]
    rules: Sequence[RetentionRule]
    lineages: Sequence[Lineage]
    tracked: dict[str, bool]
    schedule_total: int | None
    stretched: Sequence[tuple[int, int, int]]
    labels: dict[str, Any]
    mode: AsyncMode
    saver: SaverOptions
    when_busy: WhenBusy
    reader_timeout_s: float
    stop_on_error: bool
    max_failures: int
    last: LastSave
    initial: LoadRules
    open_initial: Callable[[str], TensorSource]
    parameters: Callable[[], Collection[str]]
    grace_s: float = math.inf


@final
class CheckpointHook(Hook):
    """Resumes at the start, snapshots at the end of steps, and lets the others know what became durable."""

    def __init__(self, plan: CheckpointPlan) -> None:
        self._plan = plan
        self._catalog = Catalog(plan.folder, plan.reader_timeout_s)
        self._saver: StepSaver | None = None
        self._tidying = ThreadPoolExecutor(1, thread_name_prefix="retention")
        self._failures = 0
        self._saved_from = 0
        # The newest step that is known to be durable, and why the last save failed.
        self._durable_step, self._save_error = 0, ""
        # What a start found damaged, with the reason.
        self._damaged: dict[int, str] = {}
        self._start = StartPoint(kind=StartKind.fresh)
        self._step_s = 0.0
        self._last_save_clock, self._busy = time.monotonic(), False
        # What all ranks know of these, one step late.
        self._seconds_since_save: Slot | None = None
        self._saving: Slot | None = None
        self._save_seconds: deque[float] = deque(maxlen=5)

    def restore(self, trainer: Trainer) -> None:
        context = trainer.context
        self._saver = StepSaver(
            self._plan.folder, self._plan.mode, context.device, context.cpu_group, self._plan.saver
        )
        tried = self._damaged
        while True:
            start = self._agree_on_start(trainer, tried)
            source, state, error = self._try_start(trainer, start)
            # Loading is verifying: all ranks go on with a step, or none does.
            answers: list[CheckpointError | None] = [None] * context.world_size
            dist.all_gather_object(answers, error, group=context.cpu_group)
            problem = next((a for a in answers if a is not None), None)
            if problem is None:
                break
            if not isinstance(problem, DamagedStepError) or not self._may_fall_back(start):
                raise problem
            tried[start.step] = str(problem)
            # What the damaged step has left in the moments is not the next one's, which may hold weights alone.
            trainer.optimizer.reset()
            if context.is_main:
                log.warning("%s", problem)
        self._start = start
        if state is not None:
            trainer.state = state
        if context.is_main:
            without = f", without {', '.join(start.exclude)}" if start.exclude else ""
            log.info("state: %s%s; continuing after step %d", source, without, trainer.state.step)

    def _agree_on_start(self, trainer: Trainer, damaged: Mapping[int, str]) -> StartPoint:
        """Rank 0's choice on all ranks, or its error."""
        choice: list[StartPoint | CheckpointError | None] = [None]
        if trainer.context.is_main:
            try:
                choice[0] = self._choose_start(damaged)
            except CheckpointError as error:
                choice[0] = error
            except OSError as error:
                choice[0] = CheckpointError(f"{self._plan.folder.url} cannot be read: {error}; check the storage")
        dist.broadcast_object_list(choice, group=trainer.context.cpu_group, group_src=0)
        if isinstance(choice[0], CheckpointError):
            raise choice[0]
        assert choice[0] is not None
        return choice[0]

    def _choose_start(self, damaged: Mapping[int, str]) -> StartPoint:
        """Rank 0's choice; changes nothing, so that a start that is refused leaves the run as it was."""
        entries = [e for e in self._catalog.entries(self._plan.lineages) if e.step not in damaged]
        resumable = [(e.step, e.manifest.lineage) for e in entries if e.resumable]
        start = start_point(self._plan.lineages, resumable)
        if damaged and start.kind is not StartKind.step:
            steps = ", ".join(str(step) for step in sorted(damaged))
            raise CheckpointError(
                f"{self._plan.folder.url} must hold a sound step, but {steps} cannot be used and no other is left "
                f"({next(iter(damaged.values()))}); use run.resume=never to start afresh"
            )
        if start.kind is StartKind.step and start.step not in {e.step for e in entries}:
            reason = damaged.get(start.step, "it is not there, or not complete")
            raise CheckpointError(
                f"{self._plan.folder.url} must hold step {start.step}, from which this line of steps goes on, but it "
                f"cannot be used ({reason}); go on from another one with checkpoint.load_step"
            )
        if start.path is not None:
            # Once, for all ranks: a run that is still saving would give each another step.
            return dataclasses.replace(start, path=pin_source(self._foreign(start.path)).url)
        return start

    def _foreign(self, path: str) -> Storage:
        return open_storage(path, self._plan.storage_options)

    def _clear_folder(self) -> None:
        """On rank 0, once the state is loaded: what this line of steps does not go on from gets out of its way.

        Raises:
            LeaseLostError: another writer has taken the folder over meanwhile.
        """
        if self._plan.saver.ticket is not None:
            self._plan.saver.ticket.check_not_taken(self._plan.folder)
        for line in self._catalog.clean_up(self._plan.lineages, self._damaged):
            log.warning("%s", line)
        entries = self._catalog.entries(self._plan.lineages)
        self._leave_weights(self._start, [e.step for e in entries if not e.resumable])

    def _leave_weights(self, start: StartPoint, weights_only: Sequence[int]) -> None:
        """Makes way for the steps to come where an earlier end of the run saved weights alone."""
        exported = [s for s in exported_steps(self._plan.last.folder) if s > start.step]
        if start.kind is StartKind.step and exported and not weights_only:
            log.info(
                "the save of step %d is a Hugging Face folder, without optimizer state; the last full checkpoint is "
                "of step %d",
                exported[-1],
                start.step,
            )
        for step in weights_only:
            if step > start.step:
                self._catalog.quarantine(step, "model-only")
                log.info(
                    "step %d holds the weights alone and was set aside; the last full checkpoint is of step %d",
                    step,
                    start.step,
                )

    def _may_fall_back(self, start: StartPoint) -> bool:
        """Whether another step may be taken instead: only where the user did not name this one."""
        lineage = self._plan.lineages[-1]
        named = lineage.origin is StartKind.step and start.step == lineage.origin_step
        return start.kind is StartKind.step and not (named and lineage.request.load_step >= 0)

    def _try_start(
        self, trainer: Trainer, start: StartPoint
    ) -> tuple[str, TrainState | None, CheckpointError | None]:
        """Brings the tensors to a starting point; returns where from, the state there, and what was wrong."""
        if start.kind is StartKind.fresh:
            return "fresh weights", None, None
        if start.kind is StartKind.step:
            place, source = self._catalog.step_place(start.step), f"step {start.step} of"
        else:
            assert start.path is not None
            place, source = self._foreign(start.path), "initial load from"
        source = f"{source} {place.url}"
        state: TrainState | None = None
        try:
            verified = is_verified(place)
            source += f", {'verified' if verified else 'unverified'}"
            source += ", model only" if start.model_only else ""
            source += ", Hugging Face" if start.in_hf else ""
            # One lock keeps the step for all ranks, which end their reading together.
            with reading(place) if trainer.context.is_main and verified else nullcontext():
                if start.kind is StartKind.initial:
                    found, state = self._load_initial(trainer, place, start)
                    source += found
                else:
                    state = self._load(trainer, place, start)
        except CheckpointError as error:
            # Without its cause, which may not travel to the other ranks.
            kind = DamagedStepError if isinstance(error, DamagedStepError) else CheckpointError
            return source, None, kind(str(error))
        except OSError as error:
            if place.is_remote:
                # Which says nothing of the step.
                problem = f"{place.url} cannot be read ({error}); check the storage and try again"
                return source, None, CheckpointError(problem)
            # What cannot be read is as good as damaged.
            return source, None, DamagedStepError(f"{place.url} cannot be read ({error}); use another step")
        return source, state, None

    def _load_initial(self, trainer: Trainer, place: Storage, start: StartPoint) -> tuple[str, TrainState | None]:
        """Starts from a checkpoint elsewhere; says how much of the model was found there, where that is not all."""
        state: TrainState | None = None
        tensors, parameters = model_tensors(trainer), self._plan.parameters()
        with self._plan.open_initial(place.url) as source:
            # Buffers start as the model makes them where the weights come without.
            load_from(source, tensors, self._plan.initial, optional=set(tensors) - set(parameters))
            if not start.model_only:
                state = self._load_state(trainer, place, source, start)
            found = sum(name in source.infos for name in parameters)
        return f", {found} of {len(parameters)} tensors" if found < len(parameters) else "", state

    def _load_state(self, trainer: Trainer, place: Storage, source: TensorSource, start: StartPoint) -> TrainState:
        """What such a checkpoint has beside the weights: optimizer and counters."""
        if "optimizer" not in start.exclude:
            wanted, names = optimizer_tensors(trainer), set(source.infos)
            # Preflight has looked for those of all parameters that are there.
            load_from(source, {n: t for n, t in wanted.items() if n in names}, LoadRules())
        stored = read_manifest(place, check_files=False).train_state if is_verified(place) else {}
        # Others' samples have another order than ours, which begins anew then.
        saved = _parse_state(place, stored) if stored else TrainState(step=stored_step(source) or 0)
        if not stored:
            saved.schedule_total = trainer.options.steps
        return self._as_started(trainer, saved, start)

    def _as_started(self, trainer: Trainer, saved: TrainState, start: StartPoint) -> TrainState:
        """A stored train state as this start goes on with it."""
        total = self._plan.schedule_total or max(1, trainer.options.steps - saved.step)
        state = saved.without(start.exclude, schedule_total=total)
        stretched = [
            total
            for origin, after_step, total in self._plan.stretched
            # A step before an extension, to which damage has led back, has the schedule that it had.
            if origin == state.schedule_origin and after_step <= state.step
        ]
        if self._plan.schedule_total is not None:
            state.schedule_total = self._plan.schedule_total
        elif stretched:
            state.schedule_total = stretched[-1]
        return state

    def _load(self, trainer: Trainer, place: Storage, start: StartPoint) -> TrainState | None:
        """Loads one of the run's own steps; the state there, None for weights alone."""
        tensors, counters = model_tensors(trainer), dict[str, Tensor]()
        manifest, saved = read_manifest(place, check_files=False), None
        if manifest.kind == "model":
            log.info("%s is a seed checkpoint: weights alone", place.url)
        else:
            if "optimizer" not in start.exclude:
                tensors |= optimizer_tensors(trainer)
            saved = _parse_state(place, manifest.train_state)
            if trainer.context.is_main and manifest.train_state:
                counters = {n: torch.zeros_like(t) for n, t in _state_tensors(saved).items()}
        # A run's own step holds what its model has; other starts say themselves what they leave out.
        load_tensors(place, tensors | counters, trainer.context.cpu_group, trainer.engine.names)
        if saved is None:
            return None
        _check_counters(place, saved, counters)
        return self._as_started(trainer, saved, start)

    def fit_start(self, trainer: Trainer) -> None:
        # The run's record tells of this start by now (an earlier hook's): only then is anything moved.
        run_on_main(trainer.context, self._clear_folder)
        self._saved_from = self._durable_step = trainer.state.step
        if self._plan.policies and trainer.state.step < trainer.options.steps:
            assert self._saver is not None
            self._saver.prepare(*_full_state(trainer))
        self._last_save_clock = time.monotonic()
        # Rank 0's clock decides for all.
        clock = self._own_seconds_since_save if trainer.context.is_main else lambda: 0.0
        self._seconds_since_save = trainer.reduction.sum("seconds_since_save", clock)
        self._saving = trainer.reduction.sum("saving", lambda: float(self._busy))
        last, step = self._plan.last, trainer.state.step
        if last.export is not None and step >= trainer.options.steps and step not in exported_steps(last.folder):
            # The steps are done, but were saved in full: a Hugging Face folder was asked for since.
            assert self._saver is not None
            self._save_last(trainer, self._saver, last)
            if step not in exported_steps(last.folder):
                raise LastSaveError(
                    f"step {step} must be saved in Hugging Face's format, but was not ({self._save_error}); mend the "
                    "storage and give the same command again"
                )

    def _own_seconds_since_save(self) -> float:
        return time.monotonic() - self._last_save_clock

    def before_optimizer_step(self, trainer: Trainer) -> None:
        assert self._saver is not None
        self._saver.wait_staged()

    def step_end(self, trainer: Trainer) -> None:
        assert self._saver is not None
        assert self._saving is not None
        assert self._seconds_since_save is not None
        self._handle_results(trainer, self._saver.poll())
        state, best = trainer.state, dict(trainer.state.best)
        self._track(state, trainer.measured)
        context = SaveContext(
            step=state.step,
            last_step=trainer.options.steps,
            stopping=trainer.stop is not None,
            seconds_since_save=self._seconds_since_save.value,
            metrics=trainer.measured,
            best=best,
        )
        reasons = save_reasons(self._plan.policies, context)
        ending, last = context.stopping or state.step >= trainer.options.steps, self._plan.last
        if reasons and self._saving.value > 0 and self._plan.when_busy is WhenBusy.skip and not ending:
            if trainer.context.is_main:
                log.info("step %d is not saved: the save before it is still being written", state.step)
        elif reasons and state.step >= trainer.options.steps and not last.is_full:
            self._save_last(trainer, self._saver, last)
        elif reasons:
            self._save(trainer, self._saver, reasons)
        self._busy = self._saver.is_busy
        if ending:
            self._handle_results(trainer, self._saver.wait())
            self._check_last_save(trainer)

    def _check_last_save(self, trainer: Trainer) -> None:
        """Whether what was trained is durable: a result that exists nowhere is a failure.

        Raises:
            LastSaveError: the last step was to be saved, but was not. A run that was preempted goes on from the
                step before in any case, so it is only told.
        """
        if not self._plan.policies:
            return
        # Rank 0 commits, so its word counts.
        known: list[Any] = [(self._durable_step, self._save_error)]
        dist.broadcast_object_list(known, group=trainer.context.cpu_group, group_src=0)
        durable, problem = known[0]
        if durable >= trainer.state.step:
            return
        message = (
            f"step {trainer.state.step} must be saved at the end, but was not ({problem}); the newest step is "
            f"{durable}: mend the storage and give the same command again, which trains the lost steps once more"
        )
        if trainer.stop is StopReason.preempted and trainer.state.step < trainer.options.steps:
            if trainer.context.is_main:
                log.error("%s", message)
            return
        raise LastSaveError(message)

    def stopped(self, trainer: Trainer) -> None:
        assert self._saver is not None
        if trainer.state.step > self._saved_from:
            self.step_end(trainer)
        else:
            self._handle_results(trainer, self._saver.wait())
            self._check_last_save(trainer)

    def fit_end(self, trainer: Trainer) -> None:
        if self._saver is not None:
            self._saver.close()
        self._tidying.shutdown()

    def _track(self, state: TrainState, measured: dict[str, float]) -> None:
        for name, lower in self._plan.tracked.items():
            value, best = measured.get(name), state.best.get(name)
            if value is not None and value == value and (best is None or (value < best) == lower):
                state.best[name] = value

    def _save(self, trainer: Trainer, saver: StepSaver, reasons: Sequence[str]) -> None:
        trainer.flush()
        step = trainer.state.step
        if not self._rows_are_durable(trainer, step):
            return
        manifest = self._manifest(trainer)
        tensors, owner_ranks = _full_state(trainer)
        started = time.perf_counter()
        results = saver.save(tensors, manifest, owner_ranks)
        if trainer.context.is_main:
            log.info("saving step %d (%s): %.1f ms", step, ", ".join(reasons), (time.perf_counter() - started) * 1e3)
        self._last_save_clock = time.monotonic()
        if self._seconds_since_save is not None:
            # Known at once, and not one step late.
            self._seconds_since_save.value = 0.0
        self._saved_from = step
        self._handle_results(trainer, results)

    def on_metrics(self, trainer: Trainer, row: Mapping[str, Any]) -> None:
        self._step_s = float(row.get("step_time_s", 0.0))

    def _check_grace(self, trainer: Trainer, seconds: float) -> None:
        """Says beforehand that a stop will not fit into its grace time, the first time that it is so."""
        fitted = stop_seconds(self._save_seconds, self._step_s) <= self._plan.grace_s
        self._save_seconds.append(seconds)
        needed = stop_seconds(self._save_seconds, self._step_s)
        if fitted and needed > self._plan.grace_s and trainer.context.is_main:
            log.warning(
                "a requested stop takes about %.0f s (two steps and a save), but is killed after %.0f s: up to "
                "checkpoint.interval steps would be lost; raise hydra.launcher.grace_s and the partition's grace "
                "time, or lower checkpoint.interval",
                needed,
                self._plan.grace_s,
            )

    def _manifest(self, trainer: Trainer) -> Manifest:
        """What is known of the step just done."""
        return Manifest(
            step=trainer.state.step,
            lineage=self._plan.lineages[-1].id,
            train_state=trainer.state.as_json(),
            metrics=dict(trainer.measured),
            layout=trainer.context.layout.as_dict(),
            **self._plan.labels,
        )

    def _save_last(self, trainer: Trainer, saver: StepSaver, last: LastSave) -> None:
        """The weights alone; in full where that would lose a value, which ends the run with an error."""
        trainer.flush()
        self._handle_results(trainer, saver.wait())
        if not self._rows_are_durable(trainer, trainer.state.step):
            return
        self._saved_from = trainer.state.step
        manifest = dataclasses.replace(self._manifest(trainer), kind="model")
        try:
            tensors = cast_weights(model_tensors(trainer), last.dtype, trainer.context)
        except CheckpointError as error:
            self._save(trainer, saver, ["in full"])
            self._handle_results(trainer, saver.wait())
            raise CheckpointError(f"{error} (step {trainer.state.step} was saved in full)") from error
        owner_ranks = trainer.engine.owner_ranks(list(tensors))
        if last.export is not None:
            try:
                save_in_hf(tensors, manifest, last, last.export, trainer.context, owner_ranks)
            except OSError as error:
                self._save_error = f"{error.strerror or error} ({last.folder})"
                raise LastSaveError(
                    f"step {trainer.state.step} must be saved in Hugging Face's format, but was not "
                    f"({self._save_error}); mend the storage and give the same command again"
                ) from error
            self._durable_step = trainer.state.step
            return
        self._handle_results(trainer, saver.save(tensors, manifest, owner_ranks))
        saver.wait_staged()

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
            self._handle_results(trainer, [SaveResult(step=step, url=None, error=found, seconds=0.0)])
        return found is None

    def _handle_results(self, trainer: Trainer, results: Sequence[SaveResult]) -> None:
        """Tells of saves that have ended; all ranks see the same ends, though not at the same step."""
        for result in results:
            if result.error is not None:
                self._failures += 1
                self._save_error = result.error
                self._report_failure(trainer, result)
                continue
            self._failures = 0
            self._durable_step = result.step
            if trainer.context.is_main:
                log.info("saved %s, durable after %.2f s", result.url, result.seconds)
                self._check_grace(trainer, result.seconds)
                self._tidying.submit(self._prune)
            for hook in trainer.hooks:
                hook.on_committed(trainer, result.step)

    def _prune(self) -> None:
        """Retention, beside training: what fails here costs room, not a step."""
        try:
            removed = self._catalog.prune(self._plan.rules, self._plan.lineages)
        except (OSError, CheckpointError) as error:
            log.warning("old steps cannot be removed now: %s", error)
            return
        if removed:
            log.info("removed steps %s", ", ".join(str(s) for s in removed))

    def _report_failure(self, trainer: Trainer, result: SaveResult) -> None:
        message = f"step {result.step} was not saved: {result.error}"
        if result.final:
            raise LeaseLostError(message)
        if self._plan.stop_on_error or self._failures >= self._plan.max_failures:
            raise CheckpointError(f"{message}; {self._failures} saves in a row have failed")
        if trainer.context.is_main:
            log.warning("%s; training goes on and the next due save is tried", message)


def stop_seconds(save_seconds: Iterable[float], step_s: float) -> float:
    """How long a requested stop takes: the step under way, the one in which ranks agree, and the slowest of
    the last saves.
    """
    return 2 * step_s + max(save_seconds, default=0.0)


def model_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Parameters and persistent buffers by their own names; tied ones once."""
    tensors = dict(trainer.model.named_parameters())
    persistent = trainer.model.state_dict().keys()
    return {
        **{n: p.detach() for n, p in tensors.items()},
        **{n: b for n, b in trainer.model.named_buffers() if n in persistent},
    }


def optimizer_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """The optimizer's state below `optimizer.`."""
    return {f"optimizer.{name}": tensor for name, tensor in trainer.optimizer.state_tensors().items()}


def _full_state(trainer: Trainer) -> tuple[dict[str, Tensor], Mapping[str, Sequence[int]]]:
    """What a full step holds, and the ranks that have each of it where not all do."""
    tensors = model_tensors(trainer) | optimizer_tensors(trainer) | _state_tensors(trainer.state)
    return tensors, trainer.engine.owner_ranks([n for n in tensors if not n.startswith("train_state.")])


def _state_tensors(state: TrainState) -> dict[str, Tensor]:
    """The counters for readers of plain DCP; ours come from the manifest."""
    counters = {k: v for k, v in state.as_json().items() if isinstance(v, int)}
    return {f"train_state.{name}": torch.tensor(value) for name, value in counters.items()}


def _parse_state(place: Storage, values: Mapping[str, Any]) -> TrainState:
    try:
        return TrainState.from_json(values)
    except DocumentError as error:
        raise DamagedStepError(f"the train state of {place.url} is damaged ({error}); use another step") from error


def _check_counters(place: Storage, state: TrainState, stored: Mapping[str, Tensor]) -> None:
    """Whether the train state of a manifest is the one among the tensors.

    Raises:
        DamagedStepError: a counter differs.
    """
    expected = _state_tensors(state)
    wrong = [name for name, value in stored.items() if not torch.equal(value, expected[name])]
    if wrong:
        raise DamagedStepError(
            f"{wrong[0]} in {place.url} must be what its manifest says, but is {int(stored[wrong[0]])}; use another "
            "step"
        )
