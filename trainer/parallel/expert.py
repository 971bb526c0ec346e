"""Expert parallelism: each rank has some of the experts, and tokens travel to them and back.

Nothing is dropped: ranks first exchange how many rows each expert gets, then rows by an uneven all-to-all.

Shapes: R rows, Q ranks, E a rank's experts, D model width.
"""

import functools
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from regrow.models.dispatch import number_of_run, order_by_expert, sum_rows, take_choices, take_rows
from regrow.models.moe import Experts, MixtureOfExperts
from regrow.trainer.parallel.collectives import all_reduce_no_grad, all_to_all, all_to_all_no_grad
from regrow.trainer.parallel.tensor import distribute_parameters, local, mix_in

__all__ = ["LocalExperts", "apply_expert_parallel", "set_auxiliary_loss", "sizes_on_host"]


class LocalExperts(nn.Module):
    """Some of all experts, their weights DTensors."""

    w1: nn.Parameter
    w2: nn.Parameter
    w3: nn.Parameter

    def forward(self, rows_RD: Tensor, weights_R: Tensor, ends_E: Tensor) -> Tensor:
        return Experts.compute(rows_RD, weights_R, ends_E, local(self.w1), local(self.w2), local(self.w3))


def _exchange(
    group: str,
    ranks: int,
    rows_RD: Tensor,
    weights_R: Tensor,
    ends_E: Tensor,
    experts: nn.Module,
    *,
    sizes: Callable[[Tensor, Tensor], tuple[list[int], list[int]]] | None = None,
) -> Tensor:
    """Rows to the ranks of their experts, the experts' results back to the rows.

    Rows travel in the order in which they lie; weights travel with them, so that a result needs none and is not kept.
    `sizes` stands in for `sizes_on_host` where numbers cannot be read.
    """
    counts_QE = ends_E.diff(prepend=ends_E.new_zeros(1)).view(ranks, -1)
    incoming_QE = all_to_all_no_grad(counts_QE, None, None, group)
    sent, received = (sizes or sizes_on_host)(counts_QE, incoming_QE)
    # Rows arrive sorted by rank, then expert; the experts take them by expert.
    arrived_RD = all_to_all(rows_RD, received, sent, group)
    weights_R = all_to_all(weights_R, received, sent, group)
    run_R = number_of_run(incoming_QE.flatten(), arrived_RD.shape[0])
    own = incoming_QE.shape[1]
    order = order_by_expert((run_R % own)[:, None], own)
    weights_R = take_choices(weights_R[:, None], order)
    out_RD = experts(take_rows(arrived_RD, order), weights_R, order.ends_E)
    return all_to_all(sum_rows(out_RD, order), sent, received, group)


def sizes_on_host(counts_QE: Tensor, incoming_QE: Tensor) -> tuple[list[int], list[int]]:
    """Rows to each rank and from each: the one time that the host waits for the device in a mixture of experts."""
    sent, received = torch.stack([counts_QE.sum(1), incoming_QE.sum(1)]).tolist()
    return sent, received


def apply_expert_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shards the experts by number over the `ep` axis."""
    group = mesh.get_group()
    exchange = functools.partial(_exchange, str(group.group_name), dist.get_world_size(group))
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            distribute_parameters(module.experts, mesh, Shard(0))
            mix_in(module.experts, LocalExperts)
            module.run_experts = exchange


def set_auxiliary_loss(model: nn.Module, groups: list[dist.ProcessGroup], sequences: int) -> None:
    """Makes the balancing loss a mean over a step's sequences, with counts of whole sequences.

    Args:
        model: with experts.
        groups: over whose ranks a sequence is split.
        sequences: of a step.
    """

    names = [str(group.group_name) for group in groups]

    def sum_counts(counts: Tensor) -> Tensor:
        for name in names:
            counts = all_reduce_no_grad(counts, "sum", name)
        return counts

    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            module.loss_scale, module.sum_counts = 1.0 / sequences, sum_counts
