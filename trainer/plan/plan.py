"""The whole plan of a run, of its parts."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from regrow.trainer.parallel.layout import Layout
from regrow.trainer.parallel.stages import plan_stages
from regrow.trainer.plan.checkpoint_size import CheckpointPlan, plan_checkpoint
from regrow.trainer.plan.config import PlanConfig
from regrow.trainer.plan.dry_run import Step
from regrow.trainer.plan.extrapolate import MakeModel, MakeOptimizer, dry_run_of_all_layers
from regrow.trainer.plan.mesh import Axis, axes_of, coordinates_of_rank
from regrow.trainer.plan.step_time import StepTime, plan_step_time
from regrow.trainer.precision import change_parameters

__all__ = ["RankMemory", "RunPlan", "Saves", "plan_run", "rank_memory", "with_layout"]

_GIB = 2**30
# Stages that are looked at: of more, the two ends and the middle.
_STAGES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Saves:
    """What is known of the run's checkpoints.

    Attributes:
        enabled: whether any are made.
        staged: whether a copy lies in the host's memory.
        every_steps: steps between them.
        model_only: whether the optimizer stays away.
    """

    enabled: bool
    staged: bool
    every_steps: int
    model_only: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class RankMemory:
    """Of a rank: the first of its stage, which holds the largest shards.

    Attributes:
        rank: among all.
        coordinates: along the mesh's axes.
        layers: of its stages.
        parameters: that it holds, numbers.
        kinds: bytes by kind at the moment when most is live.
        part: of the step, in which that is.
        live: bytes, the sum of `kinds`: what torch's allocator gives at its peak.
        total: bytes of the device, with the allocator's slack and what is reserved.
        fits: whether that is no more than the device has; always so on a CPU.
        host: bytes of the host's memory for this rank: the copy of a checkpoint, and the optimizer where it is
            offloaded.
    """

    rank: int
    coordinates: dict[str, int]
    layers: list[int]
    parameters: int
    kinds: dict[str, int]
    part: str
    live: int
    total: int
    fits: bool
    host: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """What a run will need.

    Attributes:
        model: its name.
        parameters: of the whole model.
        layout: the degrees.
        device_type: planned for.
        axes: of the mesh.
        ranks: of each stage (of many, both ends and the middle) its first.
        checkpoint: of a save; None where none is made.
        time: of a step.
    """

    model: str
    parameters: int
    layout: Layout
    device_type: str
    axes: list[Axis]
    ranks: list[RankMemory]
    checkpoint: CheckpointPlan | None
    time: StepTime


def plan_run(
    step: Step, machine: PlanConfig, saves: Saves, make_model: MakeModel, make_optimizer: MakeOptimizer
) -> RunPlan:
    """Plans a run that has been checked.

    Args:
        step: see `Step`.
        machine: what is assumed of it.
        saves: see `Saves`.
        make_model: of a config, on torch's default device.
        make_optimizer: of a model.
    """
    layout = step.layout
    with torch.device("meta"):
        model = make_model(step.model)
        change_parameters(model, step.precision.name)
        plain = make_optimizer(model)
    buffers = [b for n, b in model.named_buffers() if n in model.state_dict()]
    model_bytes = sum(t.nbytes for t in (*model.parameters(), *buffers))
    nodes = -(-layout.world_size // machine.gpus_per_node)
    checkpoint = None
    if saves.enabled:
        checkpoint = plan_checkpoint(
            model_bytes=model_bytes,
            optimizer_bytes=sum(t.nbytes for t in plain.state_tensors().values()),
            writers=layout.world_size,
            ranks_per_node=machine.gpus_per_node,
            nodes=nodes,
            model_only=saves.model_only,
            staged=saves.staged,
            every_steps=saves.every_steps,
            host_link_gbs=machine.host_link_gbs,
            storage_gbs=machine.storage_gbs,
        )
    staged = checkpoint.rank_bytes if checkpoint is not None and saves.staged else 0
    per_stage = layout.world_size // layout.pp
    ranks = [
        rank_memory(step, machine, stage * per_stage, make_model, make_optimizer, staged)
        for stage in _stages(layout.pp)
    ]
    batch = step.batch
    return RunPlan(
        model=step.model.name,
        parameters=sum(p.numel() for p in model.parameters()),
        layout=layout,
        device_type=step.device_type,
        axes=axes_of(layout, machine.gpus_per_node),
        ranks=ranks,
        checkpoint=checkpoint,
        time=plan_step_time(
            tokens=batch.global_batch_size * batch.seq_len,
            flops_per_token=model.flops_per_token(batch.seq_len),
            micro_batches=batch.micro_batches(layout.data_ranks),
            layout=layout,
            parallel=step.parallel,
            activation_checkpoint=step.train.activation_checkpoint,
            budget=step.train.activation_memory_budget,
            peak_tflops=machine.peak_tflops,
            mfu=machine.mfu,
        ),
    )


def _stages(pp: int) -> list[int]:
    return list(range(pp)) if pp <= _STAGES else [0, pp // 2, pp - 1]


def rank_memory(
    step: Step,
    machine: PlanConfig,
    rank: int,
    make_model: MakeModel,
    make_optimizer: MakeOptimizer,
    staged: int = 0,
) -> RankMemory:
    """The memory of one rank.

    Args:
        step: see `plan_run`, as of those up to `make_optimizer`.
        machine: what is assumed of it.
        rank: among all.
        make_model: of a config.
        make_optimizer: of a model.
        staged: bytes of a checkpoint that the rank copies to the host's memory.
    """
    layout = step.layout
    run = dry_run_of_all_layers(step, rank, make_model, make_optimizer)
    part, peak = max(run.peaks.items(), key=lambda item: item[1].size)
    on_gpu = step.device_type == "cuda"
    total = peak.size
    if on_gpu:
        total = round(total * (1 + machine.allocator_slack) + machine.reserved_gib * _GIB)
    stage = rank // (layout.world_size // layout.pp)
    plan = plan_stages(step.parallel, layout.pp, step.model.n_layers, stage)
    offloaded = 8 * run.parameters if step.train.offload_optimizer else 0
    return RankMemory(
        rank=rank,
        coordinates=coordinates_of_rank(layout, rank),
        layers=[len(plan.layers[number]) for number in plan.mine],
        parameters=run.parameters,
        kinds={kind.value: size for kind, size in peak.kinds.items() if size},
        part=part,
        live=peak.size,
        total=total,
        fits=not on_gpu or total <= machine.memory_gib * _GIB,
        host=staged + offloaded,
    )


def with_layout(step: Step, layout: Layout) -> Step:
    """The same step under another layout."""
    degrees: dict[str, Any] = dict(layout.as_dict())
    return replace(step, layout=layout, parallel=replace(step.parallel, **degrees, pp_layers=[]))
