"""How a model is parallelised, in a visible order.

Stages of the pipeline, tensor, context and expert parallelism, activation checkpointing, compilation, FSDP or HSDP.

A module's behaviour is changed in three ways, each for one purpose: where parameters become DTensors, its class
becomes a subclass that computes with local shards (`mix_in`); where an algorithm differs, a field that the model
declares for it is set (`Attention.attend`, `MixtureOfExperts.run_experts`); what wraps any forward pass,
recomputation and compilation, replaces `forward`.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from regrow.models.base import LanguageModel
from regrow.models.config import DecoderConfig
from regrow.models.cpu import CPU_PRODUCTS
from regrow.models.experts import EXPERT_PRODUCTS
from regrow.models.init import fill_shard
from regrow.models.layers import Attention
from regrow.models.moe import Experts, MixtureBlock, MixtureOfExperts
from regrow.torch_compat import attention_operators, overlap_tensor_parallel, scaled_product
from regrow.trainer.config import (
    ActivationCheckpoint,
    ContextMethod,
    ParallelConfig,
    PrecisionConfig,
    PrecisionName,
    TrainConfig,
)
from regrow.trainer.parallel.attention import AttentionPlan, plan_attention
from regrow.trainer.parallel.context import ParallelContext
from regrow.trainer.parallel.expert import LocalExperts, apply_expert_parallel, set_auxiliary_loss
from regrow.trainer.parallel.heads import kv_heads_per_rank
from regrow.trainer.parallel.memory_rules import reshard_choice
from regrow.trainer.parallel.recompute import apply_budget
from regrow.trainer.parallel.sequence import ContextGroup, apply_context_parallel
from regrow.trainer.parallel.stages import StagePlan, plan_stages
from regrow.trainer.parallel.tensor import TensorGroup, apply_tensor_parallel, shared_parameters, tie
from regrow.trainer.precision import change_precision, compute_dtype, gather_small
from regrow.trainer.shards import local_part, shard_offset

__all__ = ["ParallelModel", "initialise", "local_shard", "parallelise", "reshard"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelModel:
    """This rank's part of the model.

    Attributes:
        model: all layers that this rank has, with the names of the whole model.
        parts: a model per stage of this rank, sharing the modules of `model`; without a pipeline `model` itself.
        stages: where the stages are.
        tensor: the ranks that share matrices, None without tensor parallelism.
        attention: how the layers attend.
        names: of all parameters and stored buffers that the model has, on whichever rank.
    """

    model: LanguageModel
    parts: list[LanguageModel]
    stages: StagePlan
    tensor: TensorGroup | None
    attention: AttentionPlan
    names: frozenset[str]

    @property
    def sequence(self) -> ContextGroup | None:
        """The ranks that share sequences, None without context parallelism."""
        return None if self.attention.sequence is None else self.attention.sequence[0]


def parallelise(
    whole: LanguageModel,
    context: ParallelContext,
    *,
    model_config: DecoderConfig,
    parallel: ParallelConfig,
    train: TrainConfig,
    precision: PrecisionConfig,
    sequences: int,
) -> ParallelModel:
    """Takes this rank's part of a model made on the meta device, and changes it in place.

    Args:
        whole: the model.
        context: this rank's process groups, meshes and device.
        model_config: the model's.
        parallel: options of the degrees.
        train: activation checkpointing and compilation.
        precision: of parameters and computation.
        sequences: of an optimizer step, over all ranks.
    """
    layout = context.layout
    change_precision(whole, precision, device_type=context.device.type, tp=layout.tp)
    names = frozenset(n for n, _ in whole.named_parameters()) | _stored_buffers(whole)
    stages = plan_stages(parallel, layout.pp, model_config.n_layers, context.coordinate("pp"))
    model, parts = _take_stages(whole, stages)
    tensor = None
    attention = plan_attention(
        model,
        model_config,
        compute_dtype(precision.name),
        _sequence_method(context, parallel, model_config) if layout.cp > 1 else None,
        accelerator=context.device.type != "cpu",
    )
    if layout.tp > 1:
        tensor = apply_tensor_parallel(
            model, model_config, context.meshes.dense["tp"], sequence=parallel.sequence_parallel
        )
    if attention.sequence is not None:
        apply_context_parallel(model, *attention.sequence)
    if model_config.n_experts > 0:
        _apply_to_experts(model, context, sequences)
    apply_budget(model, train)
    if train.activation_checkpoint in (ActivationCheckpoint.selective, ActivationCheckpoint.full):
        selective = train.activation_checkpoint is ActivationCheckpoint.selective
        _checkpoint_activations(model, selective=selective, whole=context.world_size == 1)
    if train.compile is True:
        _compile(model, train.compile_backend, context if parallel.async_tp else None, whole=context.world_size == 1)
    if context.world_size > 1:
        for part in parts:
            _shard(part, context, precision, parallel)
    elif compute_dtype(precision.name) is torch.bfloat16:
        # As FSDP's mixed precision does it among several ranks, without its copies.
        model.compute_dtype = torch.bfloat16
    return ParallelModel(
        model=model,
        parts=parts,
        stages=stages,
        tensor=tensor,
        attention=attention,
        names=names,
    )


def _sequence_method(
    context: ParallelContext, parallel: ParallelConfig, model_config: DecoderConfig
) -> tuple[ContextGroup, ContextMethod]:
    """The ranks that share sequences, and how."""
    layout = context.layout
    group = ContextGroup(
        name=context.group_name("cp"),
        rank=context.coordinate("cp"),
        ranks=layout.cp,
        balance=parallel.cp_balance,
    )
    return group, context_method(parallel, model_config, layout.tp, layout.cp)


def _stored_buffers(model: nn.Module) -> frozenset[str]:
    return frozenset(n for n, _ in model.named_buffers()) & frozenset(model.state_dict())


def context_method(parallel: ParallelConfig, model_config: DecoderConfig, tp: int, cp: int) -> ContextMethod:
    """What `auto` stands for."""
    if parallel.cp_method is not ContextMethod.auto:
        return parallel.cp_method
    kv_heads = kv_heads_per_rank(model_config.n_kv_heads, tp)
    divides = model_config.n_heads // tp % cp == 0 and kv_heads % cp == 0
    return ContextMethod.ulysses if divides else ContextMethod.gather


def _take_stages(whole: LanguageModel, stages: StagePlan) -> tuple[LanguageModel, list[LanguageModel]]:
    if stages.count == 1:
        return whole, [whole]
    first, last = 0 in stages.mine, stages.count - 1 in stages.mine
    model = whole.part([n for s in stages.mine for n in stages.layers[s]], first=first, last=last)
    parts = [model.part(stages.layers[s], first=s == 0, last=s == stages.count - 1) for s in stages.mine]
    return model, parts


def _apply_to_experts(model: LanguageModel, context: ParallelContext, sequences: int) -> None:
    """Expert parallelism, and the balancing loss of sequences that ranks share."""
    if context.layout.ep > 1:
        apply_expert_parallel(model, context.meshes.experts["ep"])
    data = context.meshes.data
    set_auxiliary_loss(model, [data.get_group(a) for a in ("cp", "tp") if data[a].size() > 1], sequences)


def _compile(model: LanguageModel, backend: str, overlap: ParallelContext | None, *, whole: bool) -> None:
    """Compiles each block's forward alone: FSDP's hooks stay outside of the graph, and names stay as they are.

    Args:
        model: its blocks are compiled.
        backend: torch.compile's.
        overlap: the ranks over which tensor parallelism runs beside products; None where it does not.
        whole: whether blocks with experts are one graph; otherwise FSDP gathers experts within the block, and expert
            parallelism exchanges sizes there, so that such a block is four graphs with these between them.
    """
    if overlap is not None:
        overlap_tensor_parallel(overlap.group_name("tp"))
    for block in model.blocks():
        for owner, name in [(block, "forward")] if whole else pieces_of(block):
            # Where rows are exchanged, a rank's experts get another number of them each time.
            dynamic = True if isinstance(owner, LocalExperts) else None
            compiled = torch.compile(getattr(owner, name), backend=backend, fullgraph=True, dynamic=dynamic)
            setattr(owner, name, compiled)


def pieces_of(block: nn.Module) -> list[tuple[nn.Module, str]]:
    """The methods of a block within which no rank waits for another but in collectives of its tensors."""
    mixtures = [m for m in block.modules() if isinstance(m, MixtureOfExperts)]
    if not mixtures:
        return [(block, "forward")]
    experts = [(m, name) for m in mixtures for name in ("route", "combine")] + [
        (m.experts, "forward") for m in mixtures
    ]
    if isinstance(block, MixtureBlock):
        return [(block, "before_mixture"), *experts]
    return [*((m, "forward") for m in block.modules() if isinstance(m, Attention)), *experts]


@functools.cache
def _kept() -> frozenset[Any]:
    """The results that selective activation checkpointing keeps: those that are expensive to compute again."""
    products = torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default
    return frozenset((*products, scaled_product.default, *attention_operators(), *CPU_PRODUCTS, *EXPERT_PRODUCTS))


def _keep_products(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _kept() else CheckpointPolicy.PREFER_RECOMPUTE


def _checkpoint_activations(model: LanguageModel, *, selective: bool, whole: bool) -> None:
    """Recomputes each block in the backward pass; names of parameters stay as they are.

    Args:
        model: whose blocks.
        selective: keeps products and attention.
        whole: whether no rank takes part in another's block. FSDP gathers experts within the block, which must not
            happen in a selective context: what lies before the experts is recomputed then, and they keep their
            products, as they do in any case, and what these read.
    """
    options: dict[str, Any] = {}
    if selective:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_products)
    for block in model.blocks():
        pieces = [(block, "forward")]
        if selective and not whole:
            pieces = [(owner, name) for owner, name in pieces_of(block) if name in ("before_mixture", "forward")]
            pieces = [(owner, name) for owner, name in pieces if not isinstance(owner, Experts)]
        for owner, name in pieces:
            recomputed = functools.partial(
                torch.utils.checkpoint.checkpoint, getattr(owner, name), use_reentrant=False, **options
            )
            setattr(owner, name, recomputed)


def _shard(
    part: LanguageModel, context: ParallelContext, precision: PrecisionConfig, parallel: ParallelConfig
) -> None:
    """FSDP2 with a unit per block and one for its experts; HSDP with replicas, DDP where nothing is sharded."""
    compute = torch.bfloat16 if compute_dtype(precision.name) is torch.bfloat16 else None
    reduce = None if precision.name is PrecisionName.fp64 else torch.float32
    # Tables of positions go into the blocks in float32 and must stay so.
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce, cast_forward_inputs=False)
    layout = context.layout
    # (Schedules that split the backward pass find a stage's weights in the gathered tensors alone.)
    reshard_after = reshard_choice(parallel, layout.pp, layout.dp_shard * layout.cp)
    mesh = _data_mesh(context.meshes.dense, "fsdp")
    for block in part.blocks():
        gather_small(block, precision, context.meshes.dense["fsdp"].size())
        for module in block.modules():
            if isinstance(module, MixtureOfExperts):
                experts = _data_mesh(context.meshes.experts, "efsdp")
                ranks = context.meshes.experts["efsdp"].size()
                held = module.n_experts // layout.ep
                placement = functools.partial(_expert_placement, held=held, ranks=ranks)
                fully_shard(
                    module.experts,
                    mesh=experts,
                    mp_policy=policy,
                    shard_placement_fn=placement,
                    reshard_after_forward=reshard_choice(parallel, layout.pp, ranks),
                )
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after)
    fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after)
    for module in part.modules():
        if isinstance(module, FSDPModule):
            # The loss is divided by the global number of tokens already; gradients are summed. gloo has no
            # premultiplied sum, so the sum must be asked for.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _data_mesh(mesh: DeviceMesh, shard_axis: str) -> DeviceMesh:
    return mesh[shard_axis] if mesh["dp_replicate"].size() == 1 else mesh["dp_replicate", shard_axis]


def _expert_placement(parameter: nn.Parameter, *, held: int, ranks: int) -> Shard:
    """Shards experts by number; within their matrices where there are more ranks than experts."""
    return Shard(1) if held < ranks and parameter.shape[1] % ranks == 0 else Shard(0)


def reshard(parts: list[LanguageModel]) -> None:
    """Frees what a forward pass without a backward pass left gathered.

    FSDP keeps its outermost unit gathered until the backward pass; whoever read the parameters then would see
    tensors whose memory is about to be freed.
    """
    for part in parts:
        for module in part.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


@torch.no_grad()
def initialise(parallel: ParallelModel, device: torch.device, seed: int, length: int) -> None:
    """Allocates a parallelised meta model and fills in its first weights, the same under every layout.

    Args:
        parallel: on the meta device.
        device: of the parameters and buffers.
        seed: the run's seed.
        length: positions that its tables must cover.
    """
    for model in parallel.parts:
        shared = shared_parameters(model)
        model.to_empty(device=device)
        # Allocation makes a new tensor for every name, also for two names of one parameter.
        tie(model, shared)
        model.init_buffers(device, length)
        rules = model.init_rules()
        for name, parameter in model.named_parameters():
            local, offset = local_shard(parameter)
            fill_shard(local, name=name, rule=rules[name], global_shape=parameter.shape, offset=offset, seed=seed)


def local_shard(parameter: nn.Parameter) -> tuple[torch.Tensor, tuple[int, ...]]:
    """This rank's part of a parameter, and where it begins in the whole."""
    return local_part(parameter), shard_offset(parameter)
