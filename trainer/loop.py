"""The training loop.

restore                          # Restorer: resume, load_step, initial load, or fresh; said in one banner
before_fit
for step in steps:               # until all are done, or the ranks agree to stop
    before_step
    for microbatch: forward, backward
    before_optimizer_step        # CheckpointHook: waits until the last snapshot is copied
    clip, optimizer.step         # skipped on the device when gradients are not finite
    after_metrics(row)           # of the step before: what the device holds is read one step late
    after_optimizer_step         # ValidationHook: when due; adds val_loss to this step's row
    after_step                   # samples written; CheckpointHook: save policies
        flush: after_metrics(row)  # before a save this step's row is read at once
        before_commit(step)      # rows up to this step are made durable
        snapshot                 # written and committed behind the steps that follow
        after_commit(step)       # when it has become durable
after_last_step                  # CheckpointHook: saves what a stop found unsaved, and waits for all saves
after_fit
on_exception(error)              # only after an error: no save, no collectives
close                            # always, in reverse order
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from regrow.trainer.data.loader import Batches, StepBatch
from regrow.trainer.data.samples import SampleIds
from regrow.trainer.data.windows import Int64s
from regrow.trainer.device import memory_gib, peak_flops, seed_everything
from regrow.trainer.hook import Hook
from regrow.trainer.optimizer import Optimizer
from regrow.trainer.parallel.context import ParallelContext
from regrow.trainer.parallel.engine import Engine
from regrow.trainer.phase import Phase
from regrow.trainer.process import interrupted_by
from regrow.trainer.reduction import PendingReduction, Slot, SlotKind, StepReduction
from regrow.trainer.resources import Resources
from regrow.trainer.restore import Restorer
from regrow.trainer.schedules.base import Schedule
from regrow.trainer.state import TrainState

__all__ = ["FitResult", "NonFiniteLossError", "StopReason", "Trainer", "TrainerOptions"]

log = logging.getLogger(__name__)


class StopReason(Enum):
    """Why the loop ended."""

    finished = "finished"
    terminated = "terminated"
    preempted = "preempted"


class NonFiniteLossError(ArithmeticError):
    """The loss is not a number or infinite; going on would only repeat it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerOptions:
    """Numbers that the loop needs.

    Attributes:
        seed: the run's seed.
        steps: optimizer steps in total.
        lr: the schedule's peak.
        grad_clip: largest global gradient norm, 0 for none.
        global_batch_size: sequences a step over all ranks.
        seq_len: positions of a sequence.
        sources: names of the data's sources, whose losses are told apart where there are several.
    """

    seed: int
    steps: int
    lr: float
    grad_clip: float
    global_batch_size: int
    seq_len: int
    sources: tuple[str, ...] = ("",)


@dataclass(frozen=True, kw_only=True, slots=True)
class FitResult:
    """How the loop ended."""

    reason: StopReason
    step: int


@dataclass(kw_only=True, slots=True)
class _Pending:
    """A step whose results are still on the device.

    Attributes:
        reduction: on its way from the device.
        row: what the host knows already.
        ids: the samples of the global batch.
        labels: how many each source has in it, int64 `(sources,)`.
    """

    step: int
    reduction: PendingReduction
    row: dict[str, Any]
    ids: SampleIds
    labels: Int64s


@final
class Trainer:
    """Trains a model; everything optional is a hook.

    Args:
        options: see `TrainerOptions`.
        resources: see `Resources`.
        context: this rank's place.
        engine: runs the model.
        optimizer: over this rank's parameters.
        schedule: learning-rate factor.
        make_batches: this rank's batches from a state on; it notes in the state what later starts must know of them.
        restorer: finds the state to go on from; None for a run without checkpoints.
        hooks: in the order in which their methods run.
        state: at the start of a fresh run.
        stop_requested: whether somebody asks this rank to stop, looked at once a step.

    Attributes:
        phase: what this rank is doing, for threads that look on.
    """

    def __init__(
        self,
        *,
        options: TrainerOptions,
        resources: Resources,
        context: ParallelContext,
        engine: Engine,
        optimizer: Optimizer,
        schedule: Schedule,
        make_batches: Callable[[TrainState], Batches],
        restorer: Restorer | None,
        hooks: Sequence[Hook],
        state: TrainState,
        stop_requested: Callable[[], StopReason | None],
    ) -> None:
        self.options = options
        self.resources = resources
        self.context = context
        self.engine = engine
        self.model = engine.model
        self.optimizer = optimizer
        self.schedule = schedule
        self.restorer = restorer
        self.hooks = list(hooks)
        self.state = state
        self._begun: list[Hook] = []
        self._batches: Batches | None = None
        self._stop: StopReason | None = None
        self._asked: StopReason | None = None
        self.batch: StepBatch | None = None
        self.measured: dict[str, float] = {}
        self.phase = Phase.outside
        self._make_batches = make_batches
        self._stop_requested = stop_requested
        self._pending: _Pending | None = None
        self._request: StopReason | None = None
        self._waiting = False
        self._loss_sum = self._grad_norm = torch.zeros((), dtype=torch.float64, device=context.device)
        self.reduction = StepReduction(context.rank, context.world_size, context.device, context.cpu_group)
        # The first slot, see `pack`.
        self._loss_slot = self.reduction.sum("loss_sum", lambda: self._loss_sum)
        self._terminate_slot = self.reduction.sum("terminate", lambda: float(self._request is StopReason.terminated))
        self._preempt_slot = self.reduction.sum("preempt", lambda: float(self._request is StopReason.preempted))
        # Before the first step is known, ranks ask each other.
        self._waiting_slot = self.reduction.sum("waiting", lambda: float(self._waiting), initial=1.0)
        self._grad_norm_slot = self.reduction.carry("grad_norm", lambda: self._grad_norm)
        # Ranks that share their data with others count it once.
        self._bytes_slot = self.reduction.sum("label_bytes", self._label_bytes)
        self._source_slots = self._register_sources() if len(options.sources) > 1 else []
        engine.register(self.reduction)
        self._peak = peak_flops(context.device)
        self._flops = self.model.flops_per_token(options.seq_len)

    def _label_bytes(self) -> float:
        return float(self.batch.label_bytes) if self.batch is not None and self.context.reads_first else 0.0

    def _register_sources(self) -> list[Slot]:
        def loss_of(at: int) -> Tensor:
            return self.engine.source_losses[at]

        names = self.options.sources
        return [self.reduction.sum(f"loss_sum/{name}", partial(loss_of, at)) for at, name in enumerate(names)]

    def fit(self) -> FitResult:
        """Trains until `options.steps` or until asked to stop.

        Raises:
            NonFiniteLossError: the loss is not finite.
        """
        try:
            self._train()
        except BaseException as error:
            for hook in self._begun:
                # The first error is the one to tell, and the hooks behind this one have their own to do.
                with _only_logged(f"{type(hook).__name__}, told of an error,"):
                    hook.on_exception(self, interrupted_by(error) or error)
            raise
        finally:
            while self._begun:
                hook = self._begun.pop()
                with _only_logged(f"closing {type(hook).__name__}"):
                    hook.close(self)
            if self._batches is not None:
                with _only_logged("closing the data loader"):
                    self._batches.close()
        if self.state.step >= self.options.steps:
            return FitResult(reason=StopReason.finished, step=self.state.step)
        assert self._stop is not None, "steps are left, and nobody has asked to stop"
        return FitResult(reason=self._stop, step=self.state.step)

    def _train(self) -> None:
        if self.restorer is not None:
            restored = self.restorer.restore(self.context, self.engine, self.optimizer, self.options.steps)
            self.state = restored or self.state
        for hook in self.hooks:
            self._begun.append(hook)
            hook.before_fit(self)
        self.reduction.complete()
        self.agree_on_stop()
        self._batches = self._make_batches(self.state)
        while self.state.step < self.options.steps and self._stop is None:
            waited, self.phase = time.perf_counter(), Phase.data
            if not self._wait_for_data(self._batches):
                break
            self._step(self._batches, waited)
        self.phase = Phase.outside
        self.flush()
        for hook in self.hooks:
            hook.after_last_step(self)
        for hook in self.hooks:
            hook.after_fit(self)

    def _wait_for_data(self, batches: Batches) -> bool:
        """Waits until every rank has its batch; false when a stop was agreed on meanwhile.

        Ranks ask each other only where one of them had to wait at the last step known to all, or at the start.
        """
        if self._waiting_slot.value == 0:
            return True
        ready = Slot(name="ready", kind=SlotKind.sum, read=lambda: float(batches.ready(0.2)))
        while True:
            self._reduce_requests(ready, on_cpu=True)
            if ready.value == self.context.world_size:
                return True
            self._stop = self._agreed_stop()
            if self._stop is not None:
                return False

    def _step(self, batches: Batches, started: float) -> None:
        """One optimizer step, after which the row of the step before is complete.

        Args:
            batches: the next one is this step's.
            started: when waiting for it began.
        """
        self._waiting = not batches.ready(0.0)
        self.batch = next(batches)
        data_wait_s = time.perf_counter() - started
        self.measured, self.phase = {}, Phase.hooks
        for hook in self.hooks:
            hook.before_step(self)
        self.phase = Phase.forward_backward
        loss_sum = self._forward_backward(self.batch)
        self.phase = Phase.hooks
        for hook in self.hooks:
            hook.before_optimizer_step(self)
        self.phase = Phase.update
        lr, grad_norm = self._update()
        self._loss_sum, self._grad_norm = loss_sum, grad_norm
        self.phase = Phase.reduction
        previous, self._pending = self._pending, self._start_reduction(lr)
        # Reading the step before keeps the host one step ahead of the device and no further, so that host
        # time is device time.
        self._settle(previous)
        self.phase = Phase.hooks
        self._add_timing(time.perf_counter() - started, data_wait_s)
        for hook in self.hooks:
            hook.after_optimizer_step(self)
        for hook in self.hooks:
            hook.after_step(self)

    def _forward_backward(self, batch: StepBatch) -> Tensor:
        """Gradients of the mean loss over the global batch; returns this rank's summed loss, on the device."""

        def seed(index: int) -> None:
            seed_everything(self.options.seed, self.state.step, index, self.context.data_rank)

        # Every rank knows how many labels the global batch has, so that needs no communication.
        return self.engine.forward_backward(batch.micro_batches, max(1, int(batch.labels.sum())), seed)

    @property
    def stop(self) -> StopReason | None:
        """Why all ranks have agreed to stop; None while they have not."""
        return self._stop

    def request_stop(self, reason: StopReason) -> None:
        """Asks, on any rank, that all ranks stop. They agree on it with the step's reduction, so one step later.

        Args:
            reason: `terminated` or `preempted`; a run is finished when its steps are done.
        """
        if reason is StopReason.finished:
            raise ValueError("a stop must be requested as terminated or preempted, but is finished; use terminated")
        self._asked = self._asked or reason

    def _own_request(self) -> StopReason | None:
        """This rank's. The signal is looked at each time, since asking for it tells that signals can wait."""
        return self._stop_requested() or self._asked

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """For forward passes that are not training; afterwards the parameters are as they were."""
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.engine.reshard()
            self.model.train()

    def _update(self) -> tuple[float, Tensor]:
        """Clips and steps; where the norm is not finite nothing changes, and the host need not know yet."""
        grad_norm = self.engine.grad_norm()
        clip = self.options.grad_clip
        scale = (grad_norm / clip).clamp(min=1.0) if clip > 0 else torch.ones_like(grad_norm)
        skip = (~grad_norm.isfinite()).to(torch.float32)
        step = self.state.step + 1 - self.state.schedule_origin
        lr = self.options.lr * self.schedule.factor(step, self.state.schedule_total)
        self.optimizer.step(lr, scale, skip)
        self.optimizer.zero_grad()
        self.engine.after_update()
        self.state.step += 1
        self.state.samples_consumed += self.options.global_batch_size
        self.state.tokens += self.options.global_batch_size * self.options.seq_len
        return lr, grad_norm

    def _start_reduction(self, lr: float) -> _Pending:
        """Starts the step's one small reduction."""
        assert self.batch is not None
        self._request = self._own_request()
        return _Pending(
            step=self.state.step,
            reduction=self.reduction.start(),
            row={"lr": lr, "tokens": self.state.tokens, **self.batch.progress},
            ids=self.batch.global_ids,
            labels=self.batch.labels,
        )

    def add_metrics(self, **values: float) -> None:
        """Adds what a hook measured to the row of the step just done; save policies see it too."""
        assert self._pending is not None
        self._pending.row |= values
        self.measured |= values

    def flush(self) -> None:
        """Completes the row of the step just done, waiting for the device."""
        pending, self._pending = self._pending, None
        self._settle(pending)

    def _settle(self, pending: _Pending | None) -> None:
        """Reads a step's results from the device, hands its row on, and acts on what ranks agreed."""
        if pending is None:
            return
        known = self.reduction.finish(pending.reduction)
        loss = self._loss_slot.value / max(1, int(pending.labels.sum()))
        if not math.isfinite(loss):
            ids = ", ".join(str(i) for i in pending.ids.windows.tolist())
            raise NonFiniteLossError(f"the loss of step {pending.step} is {loss}; its sample ids were {ids}")
        self._stop = self._stop or self._agreed_stop()
        norm = self._grad_norm_slot.value if math.isfinite(self._grad_norm_slot.value) else None
        if norm is None and self.context.is_main:
            log.warning("the gradients of step %d are not finite; its update was left out", pending.step)
        row = {"step": pending.step, "loss": loss, "grad_norm": norm, **pending.row, **known}
        if self._bytes_slot.value:
            row["bits_per_byte"] = self._loss_slot.value / math.log(2) / self._bytes_slot.value
        slots = zip(self.options.sources, self._source_slots, pending.labels.tolist(), strict=False)
        row |= {f"loss/{name}": slot.value / labels for name, slot, labels in slots if labels}
        self.phase = Phase.hooks
        for hook in self.hooks:
            hook.after_metrics(self, row)

    def _add_timing(self, step_time_s: float, data_wait_s: float) -> None:
        assert self._pending is not None
        per_s, peak = self.options.global_batch_size * self.options.seq_len / step_time_s, self._peak
        self._pending.row |= {
            "tokens_per_s": per_s,
            "step_time_s": step_time_s,
            "data_wait_s": data_wait_s,
            "memory_gib": memory_gib(self.context.device),
            "mfu": None if peak is None else per_s * self._flops / (peak * self.context.world_size),
        }

    def agree_on_stop(self) -> StopReason | None:
        """Asks all ranks whether one is to stop, and waits for the answer, which then holds; every rank calls it."""
        if self._stop is None:
            self._reduce_requests()
            self._stop = self._agreed_stop()
        return self._stop

    def _reduce_requests(self, *more: Slot, on_cpu: bool = False) -> None:
        """Asks all ranks at once, outside of a step's reduction."""
        self._request = self._own_request()
        self.reduction.now(self._terminate_slot, self._preempt_slot, *more, on_cpu=on_cpu)

    def _agreed_stop(self) -> StopReason | None:
        if self._preempt_slot.value > 0:
            return StopReason.preempted
        return StopReason.terminated if self._terminate_slot.value > 0 else None


@contextmanager
def _only_logged(what: str) -> Iterator[None]:
    """For what is done on the way out: whatever fails in it, a signal included, hides no error before it."""
    try:
        yield
    except BaseException:
        log.exception("%s failed", what)
