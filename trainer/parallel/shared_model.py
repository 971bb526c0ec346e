"""A model that is asked and not trained, its matrices and experts shared by the ranks of a group.

Every rank sees all positions of all rows, one at a time where text is generated: nothing is split along the sequence,
and logits are whole on every rank.

Shapes: R rows sorted by expert, E experts, D model width, V vocabulary.
"""

import functools

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from regrow.errors import ConfigError
from regrow.models.base import LanguageModel
from regrow.models.config import DecoderConfig
from regrow.models.moe import MixtureOfExperts
from regrow.models.plan import Style
from regrow.trainer.parallel.collectives import all_reduce_no_grad
from regrow.trainer.parallel.expert import LocalExperts
from regrow.trainer.parallel.layout import divisors_of
from regrow.trainer.parallel.plan_rules import check_plan, planned_modules
from regrow.trainer.parallel.tensor import (
    TensorGroup,
    apply_tensor_parallel,
    distribute_parameters,
    local,
    mix_in,
    product,
)

__all__ = ["share_model"]


class _WholeOutput(nn.Module):
    """An output layer of whose vocabulary each rank has a part; every rank gets all logits."""

    weight: nn.Parameter
    tensor_group: TensorGroup
    out_features: int

    def forward(self, x: Tensor) -> Tensor:
        part = product(self, x, local(self.weight))
        whole = part.new_zeros(*part.shape[:-1], self.out_features)
        largest = -(-self.out_features // self.tensor_group.ranks)
        whole.narrow(-1, min(self.tensor_group.rank * largest, self.out_features), part.shape[-1]).copy_(part)
        return all_reduce_no_grad(whole, "sum", self.tensor_group.name)


def _own_experts(
    first: int, group: str, rows_RD: Tensor, weights_R: Tensor, ends_E: Tensor, experts: nn.Module
) -> Tensor:
    """The results of this rank's experts, whose rows lie together, and those of the other ranks."""
    count = local(experts.get_parameter("w1")).shape[0]
    bounds = [0, *ends_E.tolist()]
    start, stop = bounds[first], bounds[first + count]
    out_RD = rows_RD.new_zeros(rows_RD.shape)
    if stop > start:
        own = slice(start, stop)
        out_RD[own] = experts(rows_RD[own], weights_R[own], ends_E[first : first + count] - start)
    return all_reduce_no_grad(out_RD, "sum", group)


def share_model(model: LanguageModel, config: DecoderConfig, mesh: DeviceMesh) -> None:
    """Shards a model over the ranks of a mesh, in place.

    Args:
        model: whole, on the meta device.
        config: the model's.
        mesh: of one axis.

    Raises:
        ConfigError: its matrices cannot be split over so many ranks.
    """
    ranks = mesh.size()
    for number, what in ((config.n_heads, "heads"), (config.ffn_dim, "width of its feed-forward part")):
        if number % ranks:
            raise ConfigError(
                f"--tp must divide the model's {what} ({number}), but is {ranks}; use {divisors_of(number)}"
            )
    check_plan(model, config, ranks)
    # Their tokens are those of all ranks, and so are their logits.
    leave = (Style.output, Style.split_tokens, Style.expert)
    member = apply_tensor_parallel(model, config, mesh, sequence=False, leave=leave)
    for _, module, style in planned_modules(model):
        if style is Style.output:
            distribute_parameters(module, mesh, Shard(0))
            mix_in(module, _WholeOutput, tensor_group=member)
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            largest = -(-module.n_experts // member.ranks)
            distribute_parameters(module.experts, mesh, Shard(0))
            mix_in(module.experts, LocalExperts)
            first = min(member.rank * largest, module.n_experts)
            module.run_experts = functools.partial(_own_experts, first, member.name)
