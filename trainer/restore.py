"""Where a run's state comes from: resumed, another step, weights elsewhere, or fresh; said in one line of the log."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from regrow.checkpoint.documents import DocumentError
from regrow.checkpoint.errors import CheckpointError, DamagedStepError
from regrow.checkpoint.format.manifest import read_manifest
from regrow.checkpoint.format.tensor_source import TensorSource
from regrow.checkpoint.load.initial_load import LoadRules, load_from, pin_source, stored_step
from regrow.checkpoint.load.loading import is_verified, load_tensors
from regrow.checkpoint.policy.lineage import StartKind, StartPoint, start_point
from regrow.checkpoint.run.catalog import Catalog
from regrow.checkpoint.run.reader_lock import reading
from regrow.checkpoint.storage.base import Storage
from regrow.checkpoint.storage.opening import open_storage
from regrow.trainer.checkpoint_plans import RestorePlan
from regrow.trainer.export_folder import exported_steps
from regrow.trainer.named_tensors import counter_tensors, model_tensors, optimizer_tensors
from regrow.trainer.optimizer import Optimizer
from regrow.trainer.parallel.context import ParallelContext
from regrow.trainer.parallel.engine import Engine
from regrow.trainer.state import TrainState

__all__ = ["Restorer"]

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Target:
    """What is brought to the state.

    Attributes:
        context: this rank's place.
        engine: has the model.
        optimizer: over this rank's parameters.
        steps: that the run is to have.
    """

    context: ParallelContext
    engine: Engine
    optimizer: Optimizer
    steps: int


@final
class Restorer:
    """Brings model, optimizer and train state to where the run goes on, on all ranks alike.

    Args:
        plan: see `RestorePlan`.
    """

    def __init__(self, plan: RestorePlan) -> None:
        self._plan = plan
        self._catalog = Catalog(plan.folder, plan.reader_timeout_s)
        # Found damaged at this start, with the reason.
        self._damaged: dict[int, str] = {}
        self._start = StartPoint(kind=StartKind.fresh)

    def restore(
        self, context: ParallelContext, engine: Engine, optimizer: Optimizer, steps: int
    ) -> TrainState | None:
        """Loads the state that the run goes on from; every rank calls it.

        Args:
            context: this rank's place.
            engine: has the model, whose tensors are overwritten.
            optimizer: whose moments are overwritten.
            steps: that the run is to have.

        Returns:
            The train state there; None for a run that starts with step 1.

        Raises:
            CheckpointError: on all ranks alike, where there is nothing to go on from as asked.
        """
        target = _Target(context=context, engine=engine, optimizer=optimizer, steps=steps)
        while True:
            start = self._agree_on_start(context, self._damaged)
            source, state, error = self._try_start(target, start)
            # Loading is verifying: all ranks go on with a step, or none does.
            answers: list[CheckpointError | None] = [None] * context.world_size
            dist.all_gather_object(answers, error, group=context.cpu_group)
            problem = next((a for a in answers if a is not None), None)
            if problem is None:
                break
            if not isinstance(problem, DamagedStepError) or not self._may_fall_back(start):
                raise problem
            self._damaged[start.step] = str(problem)
            # What the damaged step has left in the moments is not the next one's, which may hold weights alone.
            optimizer.reset()
            if context.is_main:
                log.warning("%s", problem)
        self._start = start
        if context.is_main:
            without = f", without {', '.join(start.exclude)}" if start.exclude else ""
            step = 0 if state is None else state.step
            log.info("state: %s%s; continuing after step %d", source, without, step)
        return state

    def set_aside_unused(self) -> None:
        """On rank 0, once the run's record tells of this start: what its line of steps does not go on from gets out
        of its way.

        Raises:
            LeaseLostError: another writer has taken the folder over meanwhile.
        """
        if self._plan.ticket is not None:
            self._plan.ticket.check_not_taken(self._plan.folder)
        for line in self._catalog.clean_up(self._plan.lineages, self._damaged):
            log.warning("%s", line)
        entries = self._catalog.entries(self._plan.lineages)
        self._leave_weights(self._start, [e.step for e in entries if not e.resumable])

    def _agree_on_start(self, context: ParallelContext, damaged: Mapping[int, str]) -> StartPoint:
        """Rank 0's choice on all ranks, or its error."""
        choice: list[StartPoint | CheckpointError | None] = [None]
        if context.is_main:
            try:
                choice[0] = self._choose_start(damaged)
            except CheckpointError as error:
                choice[0] = error
            except OSError as error:
                choice[0] = CheckpointError(f"{self._plan.folder.url} cannot be read: {error}; check the storage")
        dist.broadcast_object_list(choice, group=context.cpu_group, group_src=0)
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
            return dataclasses.replace(
                start, path=pin_source(open_storage(start.path, self._plan.storage_options)).url
            )
        return start

    def _may_fall_back(self, start: StartPoint) -> bool:
        """Whether another step may be taken instead: only where the user did not name this one."""
        lineage = self._plan.lineages[-1]
        named = lineage.origin is StartKind.step and start.step == lineage.origin_step
        return start.kind is StartKind.step and not (named and lineage.request.load_step >= 0)

    def _try_start(self, target: _Target, start: StartPoint) -> tuple[str, TrainState | None, CheckpointError | None]:
        """Brings the tensors to a starting point; returns where from, the state there, and what was wrong."""
        if start.kind is StartKind.fresh:
            return "fresh weights", None, None
        if start.kind is StartKind.step:
            place, source = self._catalog.step_place(start.step), f"step {start.step} of"
        else:
            assert start.path is not None
            place, source = open_storage(start.path, self._plan.storage_options), "initial load from"
        source = f"{source} {place.url}"
        state: TrainState | None = None
        try:
            verified = is_verified(place)
            source += f", {'verified' if verified else 'unverified'}"
            source += ", model only" if start.model_only else ""
            source += ", Hugging Face" if start.in_hf else ""
            # One lock keeps the step for all ranks, which end their reading together.
            with reading(place) if target.context.is_main and verified else nullcontext():
                if start.kind is StartKind.initial:
                    found, state = self._load_initial(target, place, start)
                    source += found
                else:
                    state = self._load(target, place, start)
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

    def _load_initial(self, target: _Target, place: Storage, start: StartPoint) -> tuple[str, TrainState | None]:
        """Starts from a checkpoint elsewhere; says how much of the model was found there, where that is not all."""
        state: TrainState | None = None
        tensors, parameters = model_tensors(target.engine.model), self._plan.parameters()
        with self._plan.open_initial(place.url) as source:
            # Buffers start as the model makes them where the weights come without.
            load_from(source, tensors, self._plan.initial, optional=set(tensors) - set(parameters))
            if not start.model_only:
                state = self._load_state(target, place, source, start)
            found = sum(name in source.infos for name in parameters)
        return f", {found} of {len(parameters)} tensors" if found < len(parameters) else "", state

    def _load_state(self, target: _Target, place: Storage, source: TensorSource, start: StartPoint) -> TrainState:
        """What such a checkpoint has beside the weights: optimizer and counters."""
        if "optimizer" not in start.exclude:
            wanted, names = optimizer_tensors(target.optimizer), set(source.infos)
            # Preflight has looked for those of all parameters that are there.
            load_from(source, {n: t for n, t in wanted.items() if n in names}, LoadRules())
        stored = read_manifest(place, check_files=False).train_state if is_verified(place) else {}
        # Others' samples have another order than ours, which begins anew then.
        saved = _parse_state(place, stored) if stored else TrainState(step=stored_step(source) or 0)
        if not stored:
            saved.schedule_total = target.steps
        return self._as_started(target.steps, saved, start)

    def _load(self, target: _Target, place: Storage, start: StartPoint) -> TrainState | None:
        """Loads one of the run's own steps; the state there, None for weights alone."""
        tensors, counters = model_tensors(target.engine.model), dict[str, Tensor]()
        manifest, saved = read_manifest(place, check_files=False), None
        if manifest.kind == "model":
            log.info("%s is a seed checkpoint: weights alone", place.url)
        else:
            if "optimizer" not in start.exclude:
                tensors |= optimizer_tensors(target.optimizer)
            saved = _parse_state(place, manifest.train_state)
            if target.context.is_main and manifest.train_state:
                counters = {n: torch.zeros_like(t) for n, t in counter_tensors(saved).items()}
        # A run's own step holds what its model has; other starts say themselves what they leave out.
        load_tensors(place, tensors | counters, target.context.cpu_group, target.engine.names)
        if saved is None:
            return None
        _check_counters(place, saved, counters)
        return self._as_started(target.steps, saved, start)

    def _as_started(self, steps: int, saved: TrainState, start: StartPoint) -> TrainState:
        """A stored train state as this start goes on with it.

        Args:
            steps: that the run is to have.
            saved: as it was stored.
            start: says what of it is left out.
        """
        total = self._plan.schedule_total or max(1, steps - saved.step)
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

    def _leave_weights(self, start: StartPoint, weights_only: Sequence[int]) -> None:
        """Makes way for the steps to come where an earlier end of the run saved weights alone."""
        exported = [s for s in exported_steps(self._plan.exports) if s > start.step]
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
    expected = counter_tensors(state)
    wrong = [name for name, value in stored.items() if not torch.equal(value, expected[name])]
    if wrong:
        raise DamagedStepError(
            f"{wrong[0]} in {place.url} must be what its manifest says, but is {int(stored[wrong[0]])}; use another "
            "step"
        )
