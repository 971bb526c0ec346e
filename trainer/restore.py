"""Where a run's state comes from: resumed, another step, weights elsewhere, or fresh; the start's banner says it."""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, final

import torch
from torch import Tensor

from regrow.checkpoint.documents import DocumentError
from regrow.checkpoint.errors import CheckpointError, DamagedStepError
from regrow.checkpoint.format.stored_step import StoredStep, is_verified
from regrow.checkpoint.format.tensor_source import TensorSource
from regrow.checkpoint.load.agreement import load_agreed, storage_errors
from regrow.checkpoint.load.initial_load import LoadRules, load_from, pin_source, stored_step
from regrow.checkpoint.load.loading import load_step
from regrow.checkpoint.policy.lineage import StartKind, StartPoint, start_point
from regrow.checkpoint.run.catalog import Catalog, Scan
from regrow.checkpoint.run.reader_lock import reading
from regrow.checkpoint.storage.base import Storage
from regrow.checkpoint.storage.opening import open_storage
from regrow.trainer.bars import Bar, showing
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

    Attributes:
        source: where the state comes from, in words.
    """

    def __init__(self, plan: RestorePlan) -> None:
        self._plan = plan
        self._catalog = Catalog(plan.folder, plan.reader_timeout_s)
        # Found damaged at this start, with the reason.
        self._damaged: dict[int, str] = {}
        # On rank 0: each step's manifest, read once.
        self._scan: Scan | None = None
        self._start = StartPoint(kind=StartKind.fresh)
        # While something is loaded on the rank that shows it.
        self._bar: Bar | None = None
        self.source = "fresh weights"

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
        loaded = load_agreed(
            self._choose_start,
            lambda start: self._load_shown(target, start),
            self._replaceable,
            context.cpu_group,
            # What the damaged step has left in the moments is not the next one's, which may hold weights alone.
            before_retry=optimizer.reset,
        )
        start, self._damaged = loaded.choice, loaded.damaged
        source, state = loaded.result
        self._start = start
        without = f", without {', '.join(start.exclude)}" if start.exclude else ""
        self.source = f"{source}{without}"
        return state

    def set_aside_unused(self) -> None:
        """On rank 0, once the run's record tells of this start: what its line of steps does not go on from gets out
        of its way.

        Raises:
            LeaseLostError: another writer has taken the folder over meanwhile.
        """
        if self._plan.ticket is not None:
            self._plan.ticket.check_not_taken(self._plan.folder)
        scan = self._scanned()
        for line in self._catalog.clean_up(self._plan.lineages, self._damaged, scan):
            log.warning("%s", line)
        entries = [e for e in scan.line(self._plan.lineages) if e.step not in self._damaged]
        self._leave_weights(self._start, [e.step for e in entries if not e.resumable])

    def _choose_start(self, damaged: Mapping[int, str]) -> StartPoint:
        """Rank 0's choice; changes nothing, so that a start that is refused leaves the run as it was."""
        entries = [e for e in self._scanned().line(self._plan.lineages) if e.step not in damaged]
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

    def _scanned(self) -> Scan:
        """What lies in the folder; looked at once, since nothing is written there before the start is over."""
        if self._scan is None:
            try:
                self._scan = self._catalog.scan()
            except OSError as error:
                raise CheckpointError(
                    f"{self._plan.folder.url} cannot be read: {error}; check the storage"
                ) from error
        return self._scan

    def _replaceable(self, start: StartPoint) -> int | None:
        """The step that another one may be taken for: only where the user did not name this one."""
        lineage = self._plan.lineages[-1]
        named = lineage.origin is StartKind.step and start.step == lineage.origin_step
        may = start.kind is StartKind.step and not (named and lineage.request.load_step >= 0)
        return start.step if may else None

    def _load_shown(self, target: _Target, start: StartPoint) -> tuple[str, TrainState | None]:
        """The same, with a bar on rank 0."""
        with showing("loading", quiet=not target.context.is_main) as self._bar:
            return self._load_start(target, start)

    @property
    def _progress(self) -> Callable[[int, int], None] | None:
        return None if self._bar is None else self._bar.update

    def _load_start(self, target: _Target, start: StartPoint) -> tuple[str, TrainState | None]:
        """Brings the tensors to a starting point; returns where from, and the state there."""
        if start.kind is StartKind.fresh:
            return "fresh weights", None
        if start.kind is StartKind.step:
            folder = self._catalog.step_place(start.step)
            with storage_errors(folder):
                step = self._open_step(start.step, folder)
                with _locked(folder, target.context):
                    state = self._load(target, step, start)
            return f"step {start.step} of {folder.url}, verified", state
        assert start.path is not None
        folder = open_storage(start.path, self._plan.storage_options)
        with storage_errors(folder):
            verified = is_verified(folder)
            source = f"initial load from {folder.url}, {'verified' if verified else 'unverified'}"
            source += ", model only" if start.model_only else ""
            source += ", Hugging Face" if start.in_hf else ""
            with _locked(folder, target.context) if verified else nullcontext():
                found, state = self._load_initial(target, folder, start)
        return source + found, state

    def _open_step(self, number: int, folder: Storage) -> StoredStep:
        """The step; rank 0 has opened it to choose it, the others do so once."""
        known = [] if self._scan is None else [s for s in self._scan.complete if s.step == number]
        return known[0] if known else StoredStep.open(folder, check_files=False)

    def _load_initial(self, target: _Target, place: Storage, start: StartPoint) -> tuple[str, TrainState | None]:
        """Starts from a checkpoint elsewhere; says how much of the model was found there, where that is not all."""
        state: TrainState | None = None
        tensors, parameters = model_tensors(target.engine.model), self._plan.parameters()
        with self._plan.open_initial(place.url) as source:
            # Buffers start as the model makes them where the weights come without.
            others = set(tensors) - set(parameters)
            load_from(source, tensors, self._plan.initial, optional=others, progress=self._progress)
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
        opened = StoredStep.find(place, check_files=False)
        stored = opened.train_state if opened is not None else {}
        # Others' samples have another order than ours, which begins anew then.
        saved = _parse_state(place.url, stored) if stored else TrainState(step=stored_step(source) or 0)
        if not stored:
            saved.schedule_total = target.steps
        return self._as_started(target.steps, saved, start)

    def _load(self, target: _Target, step: StoredStep, start: StartPoint) -> TrainState | None:
        """Loads one of the run's own steps; the state there, None for weights alone."""
        tensors, counters = model_tensors(target.engine.model), dict[str, Tensor]()
        saved = None
        if step.kind == "model":
            log.info("%s is a seed checkpoint: weights alone", step.url)
        else:
            if "optimizer" not in start.exclude:
                tensors |= optimizer_tensors(target.optimizer)
            saved = _parse_state(step.url, step.train_state)
            if target.context.is_main and step.train_state:
                counters = {n: torch.zeros_like(t) for n, t in counter_tensors(saved).items()}
        # A run's own step holds what its model has; other starts say themselves what they leave out.
        load_step(step, tensors | counters, target.context.cpu_group, target.engine.names, self._progress)
        if saved is None:
            return None
        _check_counters(step.url, saved, counters)
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


@contextmanager
def _locked(folder: Storage, context: ParallelContext) -> Iterator[None]:
    """One lock keeps the step for all ranks, which end their reading together."""
    with reading(folder) if context.is_main else nullcontext():
        yield


def _parse_state(url: str, values: Mapping[str, Any]) -> TrainState:
    try:
        return TrainState.from_json(values)
    except DocumentError as error:
        raise DamagedStepError(f"the train state of {url} is damaged ({error}); use another step") from error


def _check_counters(url: str, state: TrainState, stored: Mapping[str, Tensor]) -> None:
    """Whether the train state of a manifest is the one among the tensors.

    Raises:
        DamagedStepError: a counter differs.
    """
    expected = counter_tensors(state)
    wrong = [name for name, value in stored.items() if not torch.equal(value, expected[name])]
    if wrong:
        raise DamagedStepError(
            f"{wrong[0]} in {url} must be what its manifest says, but is {int(stored[wrong[0]])}; use another step"
        )
