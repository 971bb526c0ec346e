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
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import Tensor

from regrow.trainer.data.loader import Prefetcher, StepBatch
from regrow.trainer.data.windows import Windows
from regrow.trainer.device import memory_gib, peak_flops, seed_everything
from regrow.trainer.hook import Hook
from regrow.trainer.optimizer import Optimizer
from regrow.trainer.parallel.context import ParallelContext
from regrow.trainer.parallel.engine import Engine
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
        values: float64 on the host, on its way from the device: `_REDUCED` names its slots.
        arrived: the device's event after that copy; None on a CPU.
        row: what the host knows already.
        ids: the windows of the global batch.
    """

    step: int
    values: Tensor
    arrived: torch.cuda.Event | None
    row: dict[str, Any]
    ids: Sequence[int] = field(default_factory=list)


# What ranks agree on with one reduction a step: the loss' sum, requests to stop, rank 0's clock, how many ranks are
# still writing a checkpoint, and how many had no batch ready. The gradient norm, and the busiest expert's load where
# there are experts, are the same on all ranks already and only travel along.
_REDUCED = (
    "loss_sum",
    "terminate",
    "preempt",
    "seconds_since_save",
    "saving",
    "waiting",
    "grad_norm",
    "expert_load_max",
)


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
        stop_requested: this rank's own wish to stop, looked at once a step.
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
        self.seconds_since_save = 0.0
        # This rank's own word, and what the ranks agreed one step ago.
        self.saving = self.anyone_saving = False
        self.last_save_clock = time.monotonic()
        self.batch: StepBatch | None = None
        self.measured: dict[str, float] = {}
        self._make_batches = make_batches
        self._stop_requested = stop_requested
        self._pending: _Pending | None = None
        self._waiting, self._any_rank_waits = False, True
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
        if not self._any_rank_waits:
            return True
        while True:
            request, ready = self._stop_requested(), batches.ready(0.2)
            asked = [request is StopReason.terminated, request is StopReason.preempted, ready]
            flags = torch.tensor(asked, dtype=torch.float64)
            if self.context.world_size > 1:
                dist.all_reduce(flags, group=self.context.cpu_group)
            if flags[2] == self.context.world_size:
                return True
            self.stop = _stop_of({"terminate": float(flags[0]), "preempt": float(flags[1])})
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
        previous, self._pending = self._pending, self._start_reduction(loss_sum, grad_norm, self.engine.balance(), lr)
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
        self.state.step += 1
        self.state.samples_consumed += self.options.global_batch_size
        self.state.tokens += self.options.global_batch_size * self.options.seq_len
        return lr, grad_norm

    def _start_reduction(self, loss_sum: Tensor, grad_norm: Tensor, busiest: Tensor | None, lr: float) -> _Pending:
        """Starts the step's one small reduction."""
        request = self._stop_requested()
        clock = time.monotonic() - self.last_save_clock if self.context.is_main else 0.0
        wishes = [
            float(request is StopReason.terminated),
            float(request is StopReason.preempted),
            clock,
            float(self.saving),
            float(self._waiting),
        ]
        others = torch.tensor(wishes, dtype=torch.float64).to(loss_sum.device, non_blocking=True)
        agreed = torch.cat([loss_sum.reshape(1), others])
        if self.context.world_size > 1:
            dist.all_reduce(agreed)
        known = [v.reshape(1).to(torch.float64) for v in (grad_norm, busiest) if v is not None]
        agreed = torch.cat([agreed, *known])
        arrived = None
        if agreed.device.type == "cuda":
            # Beside the steps that follow: reading it later waits for this copy alone.
            host = torch.empty(agreed.shape, dtype=agreed.dtype, pin_memory=True)
            host.copy_(agreed, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
            agreed = host
        row = {"lr": lr, "tokens": self.state.tokens}
        assert self.batch is not None
        return _Pending(
            step=self.state.step, values=agreed, arrived=arrived, row=row, ids=self.batch.global_ids.tolist()
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
        if pending.arrived is not None:
            pending.arrived.synchronize()
        values = dict(zip(_REDUCED, pending.values.tolist(), strict=False))
        loss = values["loss_sum"] / (self.options.global_batch_size * self.options.seq_len)
        if not math.isfinite(loss):
            ids = ", ".join(str(i) for i in pending.ids)
            raise NonFiniteLossError(f"the loss of step {pending.step} is {loss}; its sample ids were {ids}")
        self.seconds_since_save = values["seconds_since_save"]
        self.anyone_saving = values["saving"] > 0
        self._any_rank_waits = values["waiting"] > 0
        self.stop = self.stop or _stop_of(values)
        norm = values["grad_norm"] if math.isfinite(values["grad_norm"]) else None
        if norm is None and self.context.is_main:
            log.warning("the gradients of step %d are not finite; its update was left out", pending.step)
        row = {"step": pending.step, "loss": loss, "grad_norm": norm, **pending.row}
        if "expert_load_max" in values:
            row["expert_load_max"] = values["expert_load_max"]
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
        request = self._stop_requested()
        flags = torch.tensor(
            [float(request is StopReason.terminated), float(request is StopReason.preempted)],
            dtype=torch.float64,
            device=self.context.device,
        )
        if self.context.world_size > 1:
            dist.all_reduce(flags)
        return _stop_of(dict(zip(("terminate", "preempt"), flags.tolist(), strict=True)))


def _stop_of(values: dict[str, float]) -> StopReason | None:
    if values["preempt"] > 0:
        return StopReason.preempted
    return StopReason.terminated if values["terminate"] > 0 else None
