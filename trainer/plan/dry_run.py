"""One training step of one rank, of any size and among any number of ranks, without memory, data or other ranks.

The model, its parallelisation, the loss, the pipeline's schedule and FSDP are those of a run; tensors have shapes and
no values (fake tensors), and collectives return at once. What lives when is followed by `LiveBytes`.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from regrow.models.base import LanguageModel
from regrow.models.config import DecoderConfig
from regrow.models.cpu import use
from regrow.models.moe import MixtureOfExperts
from regrow.torch_compat import FakeTensorMode
from regrow.torch_imagined import imagined_ranks
from regrow.trainer.config import (
    ActivationCheckpoint,
    ParallelConfig,
    PipelineSchedule,
    PrecisionConfig,
    TrainConfig,
)
from regrow.trainer.data.loader import MicroBatch
from regrow.trainer.loss_kernels import LossKernels
from regrow.trainer.offload import buffer_bytes
from regrow.trainer.optimizer import Optimizer
from regrow.trainer.parallel.apply import ParallelModel, parallelise
from regrow.trainer.parallel.context import ParallelContext
from regrow.trainer.parallel.engine import Engine
from regrow.trainer.parallel.layout import Layout
from regrow.trainer.parallel.mesh import make_meshes
from regrow.trainer.parallel.rules import Batch
from regrow.trainer.parallel.tensor import shared_parameters, tie
from regrow.trainer.plan.accelerator import accelerator_kernels, imagined_grouped_product
from regrow.trainer.plan.live_bytes import Kind, LiveBytes, Peak
from regrow.trainer.plan.loss_bytes import LossSizes, loss_correction
from regrow.trainer.precision import change_parameters, compute_dtype

__all__ = ["DryRun", "Step", "dry_run"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What is run.

    Attributes:
        model: its dimensions.
        layout: the degrees.
        parallel: their options.
        train: recomputation, compilation, offloading.
        precision: of parameters and computation.
        batch: of the data.
        device_type: what is planned for, `cpu` or `cuda`.
    """

    model: DecoderConfig
    layout: Layout
    parallel: ParallelConfig
    train: TrainConfig
    precision: PrecisionConfig
    batch: Batch
    device_type: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DryRun:
    """What a rank's step held.

    Attributes:
        peaks: of each part of the step, in order.
        parameters: of this rank, numbers.
        held: bytes by kind, between steps.
    """

    peaks: dict[str, Peak]
    parameters: int
    held: Counter[Kind]

    @property
    def peak(self) -> Peak:
        """The highest of all parts."""
        return max(self.peaks.values(), key=lambda peak: peak.size)


def dry_run(
    step: Step,
    rank: int,
    make_model: Callable[[DecoderConfig], LanguageModel],
    make_optimizer: Callable[[LanguageModel], Optimizer],
) -> DryRun:
    """Runs a step of a rank.

    Args:
        step: see `Step`.
        rank: among all ranks of the layout.
        make_model: the model of a config, on torch's default device.
        make_optimizer: of a model whose parameters have their (imagined) memory.
    """
    use([])
    with ExitStack() as stack:
        stack.enter_context(imagined_ranks(step.layout.world_size, rank))
        context = _context(step.layout, rank)
        with torch.device("meta"):
            whole = make_model(step.model)
        change_parameters(whole, step.precision.name)
        live = LiveBytes()
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(live)
        stack.enter_context(live.resizing())
        parallel = _parallel_model(step, whole, context)
        live.mark([b for m in parallel.parts for b in m.buffers()], Kind.buffers)
        live.mark(list(parallel.model.parameters()), Kind.parameters)
        states = [] if step.train.offload_optimizer else [make_optimizer(parallel.model)]
        live.mark([t for optimizer in states for t in optimizer.state_tensors().values()], Kind.optimizer)
        held = live.live.copy()
        _follow(live, parallel, step)
        _train(step, parallel, context, live)
        peaks = {name: peak for name, peak in live.peaks.items() if name != "other"}
        count = sum(_local_numel(p) for p in parallel.model.parameters())
    _correct(step, peaks, parallel, count)
    return DryRun(peaks=peaks, parameters=count, held=held)


def _context(layout: Layout, rank: int) -> ParallelContext:
    group = dist.group.WORLD
    assert group is not None
    device = torch.device("cpu")
    return ParallelContext(
        layout=layout, meshes=make_meshes(layout, "cpu"), device=device, cpu_group=group, rank=rank
    )


def _parallel_model(step: Step, whole: LanguageModel, context: ParallelContext) -> ParallelModel:
    """The model in the rank's layout, with imagined memory. Nothing is compiled."""
    parallel = parallelise(
        whole,
        context,
        model_config=step.model,
        parallel=replace(step.parallel, async_tp=False),
        train=replace(step.train, compile=False),
        precision=step.precision,
        sequences=step.batch.global_batch_size,
    )
    for model in parallel.parts:
        shared = shared_parameters(model)
        model.to_empty(device=context.device)
        tie(model, shared)
        model.init_buffers(context.device, step.batch.seq_len)
    if step.layout.ep > 1:
        for module in parallel.model.modules():
            if isinstance(module, MixtureOfExperts):
                module.run_experts = functools.partial(_balanced, module.run_experts, step.layout.ep)
    return parallel


def _balanced(run: Callable[..., Tensor], ranks: int, rows_RD: Tensor, *rest: Any) -> Tensor:
    """Every rank gets as many rows as it sends, evenly from all."""
    rows = rows_RD.shape[0]
    each = [rows // ranks + (r < rows % ranks) for r in range(ranks)]
    return run(rows_RD, *rest, sizes=lambda _counts, _incoming: (each, each))


def _follow(live: LiveBytes, parallel: ParallelModel, step: Step) -> None:
    """Names the parts of the step by the blocks that run, and what comes into being by what it is for."""
    parameters = list(parallel.model.parameters())
    blocks = parallel.model.blocks()

    def gradients() -> None:
        live.mark([p.grad for p in parameters if p.grad is not None], Kind.gradients)

    for index, block in enumerate(blocks):
        name = _place(index, len(blocks))
        block.register_forward_pre_hook(functools.partial(_forward_begins, live, f"forward {name}"))
        behind = "loss" if index == len(blocks) - 1 else None
        block.register_forward_hook(functools.partial(_forward_ended, live, f"backward {name}", gradients, behind))
    for parameter in parameters:
        if not isinstance(parameter, DTensor):
            mark = functools.partial(_mark_gradient, live)
            parameter.register_post_accumulate_grad_hook(mark)  # type: ignore[no-untyped-call]
    sizes = LossSizes.of(step.model, step.layout, step.batch)

    def kind_of(func: Any, tensor: Tensor) -> Kind | None:
        name = func.name() if hasattr(func, "name") else ""
        if name.startswith("c10d::") or "all_gather" in name or "reduce_scatter" in name:
            return Kind.communication
        if tensor.shape[-1:] == (sizes.vocabulary,) and tensor.ndim > 1:
            return Kind.logits
        if tensor.shape == (sizes.vocabulary, step.model.dim) and tensor.dtype is torch.float32:
            return Kind.gradients
        return None

    live.rule(kind_of)


def _mark_gradient(live: LiveBytes, parameter: Tensor) -> None:
    if parameter.grad is not None:
        live.mark([parameter.grad], Kind.gradients)


def _place(index: int, count: int) -> str:
    """Blocks at either end have names of their own; those between are alike."""
    if index == 0:
        return "first"
    return "last" if index == count - 1 else "middle"


def _forward_begins(live: LiveBytes, name: str, *_arguments: Any) -> None:
    live.enter(name)


def _forward_ended(
    live: LiveBytes,
    name: str,
    gradients: Callable[[], None],
    behind: str | None,
    _block: nn.Module,
    _args: Any,
    out: Any,
) -> None:
    def backward_begins(_grad: Tensor) -> None:
        gradients()
        live.enter(name)

    if out.requires_grad:
        out.register_hook(backward_begins)
    if behind is not None:
        live.enter(behind)


def _micro_batches(step: Step) -> list[MicroBatch]:
    batch, layout = step.batch, step.layout
    rows = -(-batch.global_batch_size // layout.data_ranks)
    rows, count = min(batch.micro_batch_size, rows), batch.micro_batches(layout.data_ranks)
    if layout.pp == 1:
        # Behind the second one nothing new happens.
        count = min(count, 2)
    elif step.parallel.pp_schedule is PipelineSchedule.one_f_one_b:
        # As many as there are stages are held at a time, at most.
        count = min(count, layout.pp + 1)
    tokens = torch.zeros(rows, batch.seq_len, dtype=torch.int64)
    return [MicroBatch(tokens=tokens, labels=tokens, documents=None) for _ in range(count)]


def _train(step: Step, parallel: ParallelModel, context: ParallelContext, live: LiveBytes) -> None:
    precision = step.precision.name
    engine = Engine(
        parallel,
        context,
        model_config=step.model,
        schedule=step.parallel.pp_schedule,
        precision=precision,
        z_loss=step.train.z_loss,
        loss_kernels=LossKernels(_statistics, _no_gradient),
    )
    micro_batches = _micro_batches(step)
    live.enter("forward first")
    with _kernels(step):
        engine.forward_backward(micro_batches, 1, lambda _index: None)
    live.enter("update")


@contextmanager
def _kernels(step: Step) -> Iterator[None]:
    with imagined_grouped_product():
        if step.device_type == "cpu":
            yield
            return
        with accelerator_kernels(compiled=step.train.compile is True):
            yield


def _statistics(logits_RV: Tensor, _labels_R1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes alone: what rows of logits need meanwhile is arithmetic, see `loss_correction`."""
    wide = torch.promote_types(logits_RV.dtype, torch.float32)
    one, two, three = (logits_RV.new_empty(len(logits_RV), 1, dtype=wide) for _ in range(3))
    return one, two, three


def _no_gradient(*_arguments: Any) -> None:
    """The gradient is written over the logits."""


def _local_numel(parameter: Tensor) -> int:
    return parameter.to_local().numel() if isinstance(parameter, DTensor) else parameter.numel()


def _correct(step: Step, peaks: dict[str, Peak], parallel: ParallelModel, parameters: int) -> None:
    """What the device planned for does otherwise than the dry run."""
    if step.train.offload_optimizer:
        for peak in peaks.values():
            _add(peak, Kind.optimizer, buffer_bytes(4 * parameters))
    if "loss" in peaks and parallel.stages.count - 1 in parallel.stages.mine:
        sizes = LossSizes.of(step.model, step.layout, step.batch)
        dtype = compute_dtype(step.precision.name)
        compiled = step.train.compile is True
        _add(peaks["loss"], Kind.logits, loss_correction(sizes, dtype, step.device_type, compiled=compiled))
    if step.train.compile is True and step.train.activation_checkpoint is ActivationCheckpoint.selective:
        # Selective recomputation keeps every product; the compiler drops a block's last, which nobody needs.
        sizes = LossSizes.of(step.model, step.layout, step.batch)
        held = sizes.rows * step.model.dim * compute_dtype(step.precision.name).itemsize
        blocks = len(parallel.model.blocks())
        for name, passed in (("loss", 0), ("backward last", 0), ("backward middle", 1)):
            if name in peaks:
                _add(peaks[name], Kind.activations, -held * (blocks - passed))


def _add(peak: Peak, kind: Kind, size: int) -> None:
    peak.size += size
    peak.kinds[kind] += size
