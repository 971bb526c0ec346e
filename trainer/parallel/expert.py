"""Expert parallelism: each rank has some of the experts, and tokens travel to them and back.

Nothing is dropped: ranks first exchange how many rows each expert gets, then rows by an uneven all-to-all.
"""

import functools

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from regrow.models.moe import Experts, MixtureOfExperts, run_experts
from regrow.trainer.parallel.collectives import all_to_all, all_to_all_no_grad
from regrow.trainer.parallel.tensor import distribute_parameters, local, mix_in

__all__ = ["apply_expert_parallel", "set_auxiliary_loss"]


class _LocalExperts(nn.Module):
    """Experts whose weights may be DTensors."""

    w1: nn.Parameter
    w2: nn.Parameter
    w3: nn.Parameter

    def forward(self, x_SD: Tensor, expert_S: Tensor) -> Tensor:
        return Experts.compute(x_SD, expert_S, local(self.w1), local(self.w2), local(self.w3))


def experts_of(experts: nn.Module) -> int:
    """Experts on all ranks together."""
    return int(experts.get_parameter("w1").shape[0])


def _dispatch_and_combine(group: str, ranks: int, x_SD: Tensor, expert_S: Tensor, experts: nn.Module) -> Tensor:
    """Rows to the ranks of their experts, the experts' results back to the rows."""
    own = experts_of(experts) // ranks
    order_S = expert_S.argsort(stable=True)
    counts_RE = torch.bincount(expert_S, minlength=own * ranks).view(ranks, own)
    incoming_RE = all_to_all_no_grad(counts_RE, None, None, group)
    sent, received = counts_RE.sum(1).tolist(), incoming_RE.sum(1).tolist()
    rows_SD = all_to_all(x_SD[order_S], received, sent, group)
    # Rows arrive sorted by rank, then expert; the experts take them by expert.
    numbers_E = torch.arange(own, device=x_SD.device).repeat(ranks)
    expert_of_S = numbers_E.repeat_interleave(incoming_RE.flatten(), output_size=rows_SD.shape[0])
    out_SD = run_experts(rows_SD, expert_of_S, experts)
    back_SD = all_to_all(out_SD, sent, received, group)
    return torch.empty_like(back_SD).index_copy(0, order_S, back_SD)


def apply_expert_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shards the experts by number over the `ep` axis."""
    group = mesh.get_group()
    dispatch = functools.partial(_dispatch_and_combine, str(group.group_name), dist.get_world_size(group))
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            distribute_parameters(module.experts, mesh, Shard(0))
            mix_in(module.experts, _LocalExperts)
            module.run_experts = dispatch


def set_auxiliary_loss(model: nn.Module, groups: list[dist.ProcessGroup], sequences: int) -> None:
    """Makes the balancing loss a mean over a step's sequences, with counts of whole sequences.

    Args:
        model: with experts.
        groups: over whose ranks a sequence is split.
        sequences: of a step.
    """

    def sum_counts(counts: Tensor) -> Tensor:
        for group in groups:
            dist.all_reduce(counts, group=group)
        return counts

    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            module.loss_scale, module.sum_counts = 1.0 / sequences, sum_counts
