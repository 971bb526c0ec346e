"""Tokens, operations and time of a step: arithmetic on stated rates."""

from dataclasses import dataclass

from regrow.trainer.config import ActivationCheckpoint, ParallelConfig, PipelineSchedule
from regrow.trainer.parallel.layout import Layout
from regrow.trainer.parallel.stages import stages_per_rank

__all__ = ["StepTime", "bubble", "plan_step_time", "recomputed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Of one optimizer step.

    Attributes:
        tokens: over all ranks.
        micro_batches: of a rank.
        flops: of the model over all ranks, without what is computed again.
        recomputed: operations computed again, as a part of `flops`.
        bubble: the part of the step in which a stage of the pipeline has nothing to do.
        seconds: at the stated MFU, which has recomputation and communication in it; the bubble comes on top.
        tokens_per_s: over all ranks.
    """

    tokens: int
    micro_batches: int
    flops: float
    recomputed: float
    bubble: float
    seconds: float
    tokens_per_s: float


def recomputed(kind: ActivationCheckpoint, budget: float) -> float:
    """What is computed again, as a part of the model's operations: a forward pass is a third of them."""
    if kind is ActivationCheckpoint.full:
        return 1 / 3
    # What selective recomputation does again are no products.
    return (1 - budget) / 3 if kind is ActivationCheckpoint.budget else 0.0


def bubble(layout: Layout, parallel: ParallelConfig, micro_batches: int) -> float:
    """The part of a step in which a stage waits (Narayanan et al. 2021, arXiv:2104.04473, section 2.2)."""
    if layout.pp == 1 or parallel.pp_schedule is PipelineSchedule.zbv_zero_bubble:
        return 0.0
    waits = (layout.pp - 1) / stages_per_rank(parallel)
    return waits / (micro_batches + waits)


def plan_step_time(
    *,
    tokens: int,
    flops_per_token: float,
    micro_batches: int,
    layout: Layout,
    parallel: ParallelConfig,
    activation_checkpoint: ActivationCheckpoint,
    budget: float,
    peak_tflops: float,
    mfu: float,
) -> StepTime:
    """The time of a step.

    Args:
        tokens: of a step over all ranks.
        flops_per_token: of the model, forward and backward.
        micro_batches: of a rank.
        layout: the degrees.
        parallel: their options.
        activation_checkpoint: what is computed again.
        budget: with `budget`, the part that is kept.
        peak_tflops: of a device.
        mfu: the part of that which the model's own operations reach while no stage waits.
    """
    flops = flops_per_token * tokens
    waiting = bubble(layout, parallel, micro_batches)
    seconds = flops / (layout.world_size * peak_tflops * 1e12 * mfu) / (1 - waiting)
    return StepTime(
        tokens=tokens,
        micro_batches=micro_batches,
        flops=flops,
        recomputed=recomputed(activation_checkpoint, budget),
        bubble=waiting,
        seconds=seconds,
        tokens_per_s=tokens / seconds,
    )
