"""Tensor parallelism: each rank holds a shard of every matrix, and of the sequence between the matrices.

Parameters are DTensors, so that checkpoints, initialisation and the gradient norm know what a rank holds; the
computation is on local tensors with explicit collectives. With sequence parallelism (Korthikanti et al. 2022,
arXiv:2205.05198) activations between blocks are split along the sequence, too.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from regrow.models.base import LanguageModel
from regrow.models.config import DecoderConfig
from regrow.models.plan import Style
from regrow.trainer.parallel.collectives import (
    all_gather_slice_grad,
    all_gather_sum_grad,
    copy_to,
    reduce_from,
    reduce_scatter,
    shard,
)
from regrow.trainer.parallel.heads import KvHeads, kv_heads_of_rank
from regrow.trainer.parallel.plan_rules import planned_modules

__all__ = [
    "SplitOutput",
    "TensorGroup",
    "apply_tensor_parallel",
    "distribute_parameters",
    "local",
    "mix_in",
    "product",
    "shared_parameters",
    "tie",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorGroup:
    """The ranks that share matrices.

    Attributes:
        name: of the process group.
        rank: this one's number among them.
        ranks: how many.
        sequence: whether activations are split along the sequence between the matrices.
    """

    name: str
    rank: int
    ranks: int
    sequence: bool


def local(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter, as autograd sees it."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def product(module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` as the module multiplies; torch's own layers have no way of their own."""
    own = getattr(module, "product", F.linear)
    out: Tensor = own(x, weight)
    return out


_JOINED: dict[tuple[type, type], type] = {}


def _joined_class(behaviour: type, kind: type) -> type:
    """One class for all modules of a kind: compiled code is shared by modules of the same class alone."""
    if (behaviour, kind) not in _JOINED:
        _JOINED[behaviour, kind] = type(f"{behaviour.__name__}{kind.__name__}", (behaviour, kind), {})
    return _JOINED[behaviour, kind]


def mix_in(module: nn.Module, behaviour: type, **attributes: Any) -> None:
    """Puts `behaviour` before the module's own class; it stays the same object with the same parameters."""
    module.__class__ = _joined_class(behaviour, type(module))
    for name, value in attributes.items():
        setattr(module, name, value)


class _GatherInput(nn.Module):
    tensor_group: TensorGroup

    def forward(self, x: Tensor, *args: Any) -> Any:
        return super().forward(_enter(x, self.tensor_group), *args)


class _ColwiseLinear(nn.Module):
    weight: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        return product(self, x, local(self.weight))


class _SharedKvHeads(nn.Module):
    """Key/value heads that several ranks use: the weight is whole on each, which computes what its queries need.

    So a checkpoint keeps it once and the norm counts it once; its gradients, zero for heads that a rank does not use,
    are summed.
    """

    weight: nn.Parameter
    tensor_group: TensorGroup
    kv_heads: KvHeads
    head_dim: int

    def forward(self, x: Tensor) -> Tensor:
        weight, heads = copy_to(local(self.weight), self.tensor_group.name), self.kv_heads
        out = product(self, x, weight.narrow(0, heads.first * self.head_dim, heads.count * self.head_dim))
        if heads.repeats == tuple(range(heads.count)):
            return out
        parts = torch.split(out, self.head_dim, dim=-1)
        return torch.cat([parts[head] for head in heads.repeats], dim=-1)


class _RowwiseLinear(nn.Module):
    weight: nn.Parameter
    tensor_group: TensorGroup

    def forward(self, x: Tensor) -> Tensor:
        return _leave(product(self, x, local(self.weight)), self.tensor_group)


class SplitOutput(nn.Module):
    """An output layer of whose vocabulary each rank has a part."""

    weight: nn.Parameter
    tensor_group: TensorGroup

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What its product takes: hidden states of the whole sequence, and this rank's part of the weight."""
        return _enter(x, self.tensor_group), local(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return product(self, *self.operands(x))


class _Vocabulary(nn.Module):
    weight: nn.Parameter
    tensor_group: TensorGroup
    first_row: int

    def forward(self, tokens: Tensor) -> Tensor:
        weight = local(self.weight)
        if weight.shape[0] == 0:
            # Fewer rows than ranks: no rows here, but a gradient of the right shape.
            rows = weight.sum() + weight.new_zeros(*tokens.shape, weight.shape[1])
            return _leave(rows, self.tensor_group)
        local_rows = tokens - self.first_row
        outside = (local_rows < 0) | (local_rows >= weight.shape[0])
        rows = F.embedding(local_rows.masked_fill(outside, 0), weight).masked_fill(outside[..., None], 0.0)
        return _leave(rows, self.tensor_group)


class _ReplicatedWeight(nn.Module):
    """The same weight for what the ranks have different parts of: the weight's gradients are summed."""

    weight: nn.Parameter
    tensor_group: TensorGroup
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        weight = copy_to(local(self.weight), self.tensor_group.name)
        if weight.ndim == 1:
            return F.rms_norm(x, (x.shape[-1],), weight, self.eps)
        return F.linear(x, weight)


class _ReplicatedModule(nn.Module):
    """The same weight for what all ranks have alike."""

    weight: nn.Parameter
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), local(self.weight), self.eps)


class _SplitTokens(nn.Module):
    """Each rank takes its part of the tokens, which with sequence parallelism it has already."""

    tensor_group: TensorGroup

    def forward(self, x_BTD: Tensor, valid_BT: Tensor | None) -> Any:
        g = self.tensor_group
        if valid_BT is not None:
            valid_BT = valid_BT.tensor_split(g.ranks, dim=1)[g.rank]
        if g.sequence:
            return super().forward(x_BTD, valid_BT)
        out_BTD = super().forward(shard(x_BTD, 1, g.rank, g.ranks, g.name), valid_BT)
        return all_gather_slice_grad(out_BTD, 1, g.rank, g.name)


def _enter(x_BTD: Tensor, g: TensorGroup) -> Tensor:
    return all_gather_sum_grad(x_BTD, 1, g.name) if g.sequence else copy_to(x_BTD, g.name)


def _leave(x_BTD: Tensor, g: TensorGroup) -> Tensor:
    return reduce_scatter(x_BTD, 1, g.name) if g.sequence else reduce_from(x_BTD, g.name)


def distribute_parameters(module: nn.Module, mesh: DeviceMesh, placement: Placement) -> None:
    """Makes a module's own parameters DTensors; they are still on the meta device."""
    for name, parameter in module.named_parameters(recurse=False):
        if isinstance(parameter, DTensor):
            continue
        shape = list(parameter.shape)
        if isinstance(placement, Shard):
            size, chunk = shape[placement.dim], -(-shape[placement.dim] // mesh.size())
            start = min(mesh.get_local_rank() * chunk, size)
            shape[placement.dim] = min(start + chunk, size) - start
        part = torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
        distributed = DTensor.from_local(
            part, mesh, [placement], run_check=False, shape=parameter.shape, stride=parameter.stride()
        )
        setattr(module, name, nn.Parameter(distributed, requires_grad=parameter.requires_grad))


def shared_parameters(model: nn.Module) -> list[tuple[str, str]]:
    """Pairs (first name, other name) of parameters that are one."""
    first: dict[nn.Parameter, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return [(first[p], name) for name, p in named if first.setdefault(p, name) != name]


def tie(model: nn.Module, shared: Sequence[tuple[str, str]]) -> None:
    """Makes pairs of names, as `shared_parameters` gives them, one parameter again."""
    for first, other in shared:
        owner, _, leaf = other.rpartition(".")
        setattr(model.get_submodule(owner), leaf, model.get_parameter(first))


def apply_tensor_parallel(
    model: LanguageModel,
    config: DecoderConfig,
    mesh: DeviceMesh,
    *,
    sequence: bool,
    leave: Collection[Style] = (),
) -> TensorGroup:
    """Shards the matrices as the model's plan says.

    Args:
        model: on the meta device.
        config: the model's.
        mesh: the `tp` axis.
        sequence: split activations along the sequence between the matrices.
        leave: what is left as it is, for the caller to change.
    """
    group = mesh.get_group()
    member = TensorGroup(
        name=str(group.group_name), rank=dist.get_rank(group), ranks=dist.get_world_size(group), sequence=sequence
    )
    kv_heads = kv_heads_of_rank(config.n_kv_heads, member.ranks, member.rank)
    shared = shared_parameters(model)
    for _, module, style in planned_modules(model):
        if style in leave:
            continue
        if style is Style.kv_heads and kv_heads.shared:
            _share_kv_heads(module, config.head_width, kv_heads, mesh, member)
        else:
            _apply_style(module, style, mesh, member)
    # Each name got a DTensor of its own.
    tie(model, shared)
    return member


def _share_kv_heads(
    module: nn.Module, head_dim: int, kv_heads: KvHeads, mesh: DeviceMesh, member: TensorGroup
) -> None:
    distribute_parameters(module, mesh, Replicate())
    mix_in(module, _SharedKvHeads, tensor_group=member, kv_heads=kv_heads, head_dim=head_dim)


def _apply_style(module: nn.Module, style: Style, mesh: DeviceMesh, member: TensorGroup) -> None:
    match style:
        case Style.vocabulary:
            rows = module.get_parameter("weight").shape[0]
            distribute_parameters(module, mesh, Shard(0))
            mix_in(
                module, _Vocabulary, tensor_group=member, first_row=min(member.rank * -(-rows // member.ranks), rows)
            )
        case Style.gather_input:
            mix_in(module, _GatherInput, tensor_group=member)
        case Style.colwise | Style.kv_heads:
            distribute_parameters(module, mesh, Shard(0))
            mix_in(module, _ColwiseLinear)
        case Style.rowwise:
            distribute_parameters(module, mesh, Shard(1))
            mix_in(module, _RowwiseLinear, tensor_group=member)
        case Style.output:
            distribute_parameters(module, mesh, Shard(0))
            mix_in(module, SplitOutput, tensor_group=member)
        case Style.per_head:
            distribute_parameters(module, mesh, Replicate())
            mix_in(module, _ReplicatedWeight, tensor_group=member)
        case Style.sequence:
            distribute_parameters(module, mesh, Replicate())
            # A router sees different tokens on each rank in any case.
            parts = member.sequence or isinstance(module, nn.Linear)
            mix_in(
                module,
                _ReplicatedWeight if parts else _ReplicatedModule,
                **({"tensor_group": member} if parts else {}),
            )
        case Style.split_tokens:
            mix_in(module, _SplitTokens, tensor_group=member)
        case Style.expert:
            # Experts see different tokens on every rank; they are sharded over the expert mesh alone.
            pass
