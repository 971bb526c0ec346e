"""How a model is parallelised, in a visible order: activation checkpointing, compilation, FSDP or HSDP."""

import functools
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from models.base import LanguageModel
from models.init import fill_shard
from trainer.config import ActivationCheckpoint, PrecisionName, TrainConfig
from trainer.parallel.context import ParallelContext

__all__ = ["initialise", "local_shard", "parallelise", "reshard"]


def parallelise(model: LanguageModel, context: ParallelContext, train: TrainConfig, precision: PrecisionName) -> None:
    """Changes the model, made on the meta device, in place."""
    if train.activation_checkpoint is not ActivationCheckpoint.none:
        _checkpoint_activations(model, selective=train.activation_checkpoint is ActivationCheckpoint.selective)
    if train.compile:
        for block in model.blocks():
            # The forward alone: FSDP's hooks stay outside of the graph, and names stay as they are.
            block.forward = torch.compile(block.forward, backend=train.compile_backend, fullgraph=True)
    # bfloat16 comes from FSDP's mixed precision, so one rank computes as several do.
    if context.world_size > 1 or precision is PrecisionName.bf16:
        _shard(model, context, precision)


# The results that selective activation checkpointing keeps: those that are dear to compute again.
_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def _keep_products(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def _checkpoint_activations(model: LanguageModel, *, selective: bool) -> None:
    """Recomputes each block in the backward pass; names of parameters stay as they are."""
    options: dict[str, Any] = {}
    if selective:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_products)
    for block in model.blocks():
        block.forward = functools.partial(
            torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False, **options
        )


def _shard(model: LanguageModel, context: ParallelContext, precision: PrecisionName) -> None:
    """FSDP2 with one unit per block; HSDP where there are replicas, DDP where nothing is sharded."""
    mesh = context.mesh["dp_shard"] if context.layout.dp_replicate == 1 else context.mesh
    compute = torch.bfloat16 if precision is PrecisionName.bf16 else None
    # Tables of positions go into the blocks in float32 and must stay so.
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks():
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is divided by the global number of tokens already; gradients are summed. gloo has no
            # premultiplied sum, so the sum must be asked for.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def reshard(model: LanguageModel) -> None:
    """Gives back what a forward pass without a backward pass left gathered.

    FSDP keeps its outermost unit gathered until the backward pass; anybody who looked at the parameters then
    would see tensors whose memory is about to go.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def initialise(model: LanguageModel, device: torch.device, seed: int, length: int) -> None:
    """Gives a parallelised meta model its memory and its first weights, the same under every layout.

    Args:
        model: on the meta device.
        device: where it will live.
        seed: the run's seed.
        length: positions that its tables must cover.
    """
    shared = _shared_parameters(model)
    model.to_empty(device=device)
    # Giving memory makes a new tensor of every name, also of two names of one parameter.
    for first, other in shared:
        owner, _, leaf = other.rpartition(".")
        setattr(model.get_submodule(owner), leaf, model.get_parameter(first))
    model.init_buffers(device, length)
    rules = model.init_rules()
    for name, parameter in model.named_parameters():
        local, offset = local_shard(parameter)
        fill_shard(local, name=name, rule=rules[name], global_shape=parameter.shape, offset=offset, seed=seed)


def _shared_parameters(model: nn.Module) -> list[tuple[str, str]]:
    """Pairs (first name, other name) of parameters that are one."""
    first: dict[nn.Parameter, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return [(first[p], name) for name, p in named if first.setdefault(p, name) != name]


def local_shard(parameter: nn.Parameter) -> tuple[torch.Tensor, tuple[int, ...]]:
    """This rank's part of a parameter, and where it begins in the whole."""
    if not isinstance(parameter, DTensor):
        return parameter, (0,) * parameter.ndim
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return parameter.to_local(), tuple(offset)
