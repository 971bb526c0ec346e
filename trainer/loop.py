"""The training loop.

restore                          # CheckpointHook: resume, load_step, initial load, or fresh; said in one banner
fit_start
for step in steps:
    stopped                      # only when asked to stop while waiting for data: CheckpointHook saves the last step
    step_start
    for microbatch: forward, backward
    before_optimizer_step        # CheckpointHook: waits until the last snapshot is copied
    clip, optimizer.step         # skipped on the device when gradients are not finite
    on_metrics(row)              # of the step before: what the device holds is read one step late
    validate                     # when due; adds val_loss to this step's row
    step_end                     # samples written; CheckpointHook: save policies
        flush: on_metrics(row)   # before a save this step's row is read at once
        before_commit(step)      # rows up to this step are made durable
        snapshot                 # written and committed behind the steps that follow
        on_committed(step)       # when it has become durable
fit_end
on_exception                     # no save, no collectives
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, final

import torch
from tokenizers import Tokenizer
from torch import Tensor

from regrow.trainer.data.loader import Prefetcher, StepBatch
from regrow.trainer.data.windows import Windows
from regrow.trainer.device import memory_gib, peak_flops, seed_everything
from regrow.trainer.hook import Hook
from regrow.trainer.optimizer import Optimizer
from regrow.trainer.parallel.context import ParallelContext
from regrow.trainer.parallel.engine import Engine
from regrow.trainer.reduction import PendingReduction, Slot, SlotKind, StepReduction
from regrow.trainer.schedules.base import Schedule
from regrow.trainer.state import TrainState

__all__ = ["FitResult", "NonFiniteLossError", "Resources", "StopReason", "Trainer", "TrainerOptions"]

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
        seq_len: tokens a sequence.
    """

    seed: int
    steps: int
    lr: float
    grad_clip: float
    global_batch_size: int
    seq_len: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """What hooks may need of the run beside the trainer itself.

    Attributes:
        run_dir: the run's directory.
        tokenizer: of the data.
        validation: the held-out windows; may be empty.
        micro_batch_size: rows of a forward pass.
        document_mask: whether attention stays within documents.
    """

    run_dir: Path
    tokenizer: Tokenizer
    validation: Windows
    micro_batch_size: int
    document_mask: bool


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
        ids: the windows of the global batch.
    """

    step: int
    reduction: PendingReduction
    row: dict[str, Any]
    ids: Sequence[int] = field(default_factory=list)


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
        make_batches: given samples consumed, this rank's batches from there on.
        hooks: in the order in which their methods run.
        state: at the start of a fresh run.
        stop_requested: whether somebody asks this rank to stop, looked at once a step.
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
        make_batches: Callable[[int], Prefetcher],
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
        self.hooks = list(hooks)
        self.state = state
        self.stop: StopReason | None = None
        self.batch: StepBatch | None = None
        self.measured: dict[str, float] = {}
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
        engine.register(self.reduction)
        self._peak = peak_flops(context.device)
        self._flops = self.model.flops_per_token(options.seq_len)

    def fit(self) -> FitResult:
        """Trains until `options.steps` or until asked to stop.

        Raises:
            NonFiniteLossError: the loss is not finite.
        """
        batches: Prefetcher | None = None
        try:
            self._call("restore")
            self._call("fit_start")
            self.reduction.complete()
            self.stop = self.agree_on_stop()
            batches = self._make_batches(self.state.samples_consumed)
            while self.state.step < self.options.steps and self.stop is None:
                waited = time.perf_counter()
                if not self._wait_for_data(batches):
                    self._call("stopped")
                    break
                self._step(batches, waited)
            self.flush()
            self._call("fit_end")
        except BaseException as error:
            for hook in self.hooks:
                try:
                    hook.on_exception(self, error)
                except Exception:
                    # The first error is the one to tell, and the hooks behind this one have their own to do.
                    log.exception("%s failed while it was told of an error", type(hook).__name__)
            raise
        finally:
            if batches is not None:
                batches.close()
        done = self.state.step >= self.options.steps
        reason = StopReason.finished if done else (self.stop or StopReason.finished)
        return FitResult(reason=reason, step=self.state.step)

    def _call(self, event: str) -> None:
        for hook in self.hooks:
            getattr(hook, event)(self)

    def _wait_for_data(self, batches: Prefetcher) -> bool:
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
            self.stop = self._agreed_stop()
            if self.stop is not None:
                return False

    def _step(self, batches: Prefetcher, started: float) -> None:
        """One optimizer step, after which the row of the step before is complete.

        Args:
            batches: the next one is this step's.
            started: when waiting for it began.
        """
        self._waiting = not batches.ready(0.0)
        self.batch = next(batches)
        data_wait_s = time.perf_counter() - started
        self.measured = {}
        self._call("step_start")
        loss_sum, tokens = self._forward_backward(self.batch)
        self._call("before_optimizer_step")
        lr, grad_norm = self._update()
        self._loss_sum, self._grad_norm = loss_sum, grad_norm
        previous, self._pending = self._pending, self._start_reduction(lr)
        # Reading the step before keeps the host one step ahead of the device and no further, so that host
        # time is device time.
        self._settle(previous)
        self._add_timing(time.perf_counter() - started, data_wait_s, tokens)
        self._call("validate")
        self._call("step_end")

    def _forward_backward(self, batch: StepBatch) -> tuple[Tensor, int]:
        """Gradients of the mean loss over the global batch; returns this rank's summed loss, on the device."""
        # Every label of a fixed window counts, so the global number needs no communication.
        tokens = self.options.global_batch_size * self.options.seq_len

        def seed(index: int) -> None:
            seed_everything(self.options.seed, self.state.step, index, self.context.data_rank)

        return self.engine.forward_backward(batch.micro_batches, tokens, seed), tokens

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
        self._request = self._stop_requested()
        return _Pending(
            step=self.state.step,
            reduction=self.reduction.start(),
            row={"lr": lr, "tokens": self.state.tokens},
            ids=self.batch.global_ids.tolist(),
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
        loss = self._loss_slot.value / (self.options.global_batch_size * self.options.seq_len)
        if not math.isfinite(loss):
            ids = ", ".join(str(i) for i in pending.ids)
            raise NonFiniteLossError(f"the loss of step {pending.step} is {loss}; its sample ids were {ids}")
        self.stop = self.stop or self._agreed_stop()
        norm = self._grad_norm_slot.value if math.isfinite(self._grad_norm_slot.value) else None
        if norm is None and self.context.is_main:
            log.warning("the gradients of step %d are not finite; its update was left out", pending.step)
        row = {"step": pending.step, "loss": loss, "grad_norm": norm, **pending.row, **known}
        for hook in self.hooks:
            hook.on_metrics(self, row)

    def _add_timing(self, step_time_s: float, data_wait_s: float, tokens: int) -> None:
        assert self._pending is not None
        per_s, peak = tokens / step_time_s, self._peak
        self._pending.row |= {
            "tokens_per_s": per_s,
            "step_time_s": step_time_s,
            "data_wait_s": data_wait_s,
            "memory_gib": memory_gib(self.context.device),
            "mfu": None if peak is None else per_s * self._flops / (peak * self.context.world_size),
        }

    def agree_on_stop(self) -> StopReason | None:
        """Asks all ranks whether one wants to stop; waits for the answer."""
        self._reduce_requests()
        return self._agreed_stop()

    def _reduce_requests(self, *more: Slot, on_cpu: bool = False) -> None:
        """Asks all ranks at once, outside of a step's reduction."""
        self._request = self._stop_requested()
        self.reduction.now(self._terminate_slot, self._preempt_slot, *more, on_cpu=on_cpu)

    def _agreed_stop(self) -> StopReason | None:
        if self._preempt_slot.value > 0:
            return StopReason.preempted
        return StopReason.terminated if self._terminate_slot.value > 0 else None
