"""Collectives that autograd sees, each with the one that its gradient needs.

A group is given by its name, so that a compiled block can hold it. Results are complete when they are returned: a
compiled graph would lose the gradient of an asynchronous one. A graph takes the functional collectives; outside of
one they cost the processor a multiple of what the group's own do, which matters where a step is many small ones.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from regrow.torch_compat import all_gather, functional_collectives, gather_into, process_group, scatter_into
from regrow.torch_compat import reduce_scatter as reduce_scatter_tensor

__all__ = [
    "all_gather_no_grad",
    "all_gather_slice_grad",
    "all_gather_sum_grad",
    "all_reduce_no_grad",
    "all_to_all",
    "all_to_all_no_grad",
    "copy_to",
    "reduce_from",
    "reduce_scatter",
    "ring_send_recv_start",
    "ring_send_recv_wait",
    "shard",
]


_f: Any = functional_collectives
_OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


def all_reduce_no_grad(x: Tensor, operation: str, group: str) -> Tensor:
    """`sum` or `max` over the group; autograd does not see it."""
    out: Tensor
    if torch.compiler.is_compiling():
        out = _f.wait_tensor(_f.all_reduce(x.contiguous(), operation, group))
        return out
    out = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, _OPERATIONS[operation], process_group(group))
    return out


def all_gather_no_grad(x: Tensor, group: str) -> Tensor:
    """The ranks' parts joined along the first dimension; autograd does not see it."""
    return _gather(x, 0, group)


def all_to_all_no_grad(x: Tensor, received: list[int] | None, sent: list[int] | None, group: str) -> Tensor:
    """Sends rows to ranks and receives theirs, equally many where no numbers are given; autograd does not see it."""
    if torch.compiler.is_compiling():
        out: Tensor = _f.wait_tensor(_f.all_to_all_single(x.contiguous(), received, sent, group))
        return out
    return _all_to_all(x, received, sent, group, wait=True)[0]


def _all_to_all(
    x: Tensor, received: list[int] | None, sent: list[int] | None, group: str, *, wait: bool
) -> tuple[Tensor, Any]:
    own = x.detach().contiguous()
    out = torch.empty_like(own) if received is None else own.new_empty(sum(received), *own.shape[1:])
    return out, dist.all_to_all_single(out, own, received, sent, process_group(group), async_op=not wait)


def ring_send_recv_start(x: Tensor, rank: int, ranks: int, group: str) -> Any:
    """Starts sending `x` to the next rank of a ring; autograd does not see it.

    Returns:
        What `ring_send_recv_wait` waits for.
    """
    count = x.numel()
    sent = [count if r == (rank + 1) % ranks else 0 for r in range(ranks)]
    received = [count if r == (rank - 1) % ranks else 0 for r in range(ranks)]
    if torch.compiler.is_compiling():
        return _f.all_to_all_single(x.reshape(-1), received, sent, group)
    return _all_to_all(x.reshape(-1), received, sent, group, wait=False)


def ring_send_recv_wait(coming: Any, like: Tensor) -> Tensor:
    """What the rank before has sent, once it is here, in the shape of `like`."""
    out: Tensor
    if isinstance(coming, tuple):
        out, work = coming
        work.wait()
    else:
        out = _f.wait_tensor(coming)
    return out.view(like.shape)


def _gather(x: Tensor, dim: int, group: str) -> Tensor:
    out: Tensor
    if torch.compiler.is_compiling():
        out = _f.wait_tensor(all_gather(x.contiguous(), 0, group))
    else:
        members = process_group(group)
        out = x.new_empty(x.shape[0] * members.size(), *x.shape[1:])
        gather_into(out, x.detach().contiguous(), members)
    # The library's own way to another dimension cannot be compiled in torch 2.11.
    return out if dim == 0 else torch.cat(out.chunk(out.shape[0] // x.shape[0]), dim)


def _scatter(x: Tensor, dim: int, group: str) -> Tensor:
    if torch.compiler.is_compiling():
        out: Tensor = _f.wait_tensor(reduce_scatter_tensor(x.contiguous(), "sum", dim, group))
        return out
    members = process_group(group)
    ranks = members.size()
    whole = x.detach().contiguous() if dim == 0 else torch.cat(x.detach().chunk(ranks, dim))
    out = x.new_empty(whole.shape[0] // ranks, *whole.shape[1:])
    scatter_into(out, whole, members)
    return out


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce_no_grad(grad, "sum", ctx.group), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: Tensor, group: str) -> Tensor:
        return all_reduce_no_grad(x, "sum", group)

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _AllGatherSumGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: str) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _scatter(grad, ctx.dim, ctx.group), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: str) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _scatter(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _gather(grad, ctx.dim, ctx.group), None, None


class _Shard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, rank: int, ranks: int, group: str) -> Tensor:
        ctx.dim, ctx.group = dim, group
        size = x.shape[dim] // ranks
        return x.narrow(dim, rank * size, size).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _gather(grad, ctx.dim, ctx.group), None, None, None, None


class _AllGatherSliceGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, rank: int, group: str) -> Tensor:
        ctx.dim, ctx.rank, ctx.size = dim, rank, x.shape[dim]
        return _gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad.narrow(ctx.dim, ctx.rank * ctx.size, ctx.size).contiguous(), None, None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, received: list[int], sent: list[int], group: str) -> Tensor:
        ctx.received, ctx.sent, ctx.group = received, sent, group
        return all_to_all_no_grad(x, received, sent, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return all_to_all_no_grad(grad, ctx.sent, ctx.received, ctx.group), None, None, None


def copy_to(x: Tensor, group: str) -> Tensor:
    """`x`, which all ranks of the group have and use for different things: gradients are summed."""
    out: Tensor = _CopyTo.apply(x, group)  # type: ignore[no-untyped-call]
    return out


def reduce_from(x: Tensor, group: str) -> Tensor:
    """The sum over the group, which all ranks use for the same thing."""
    out: Tensor = _ReduceFrom.apply(x, group)  # type: ignore[no-untyped-call]
    return out


def all_gather_sum_grad(x: Tensor, dim: int, group: str) -> Tensor:
    """The ranks' parts joined along `dim`, used for different things; gradients are summed and split again."""
    out: Tensor = _AllGatherSumGrad.apply(x, dim, group)  # type: ignore[no-untyped-call]
    return out


def reduce_scatter(x: Tensor, dim: int, group: str) -> Tensor:
    """This rank's part, along `dim`, of the sum over the group."""
    out: Tensor = _ReduceScatter.apply(x, dim, group)  # type: ignore[no-untyped-call]
    return out


def shard(x: Tensor, dim: int, rank: int, ranks: int, group: str) -> Tensor:
    """This rank's part, along `dim`, of what all ranks have; gradients are joined."""
    out: Tensor = _Shard.apply(x, dim, rank, ranks, group)  # type: ignore[no-untyped-call]
    return out


def all_gather_slice_grad(x: Tensor, dim: int, rank: int, group: str) -> Tensor:
    """The ranks' parts joined along `dim`, used for the same thing; each rank takes its part of the gradient."""
    out: Tensor = _AllGatherSliceGrad.apply(x, dim, rank, group)  # type: ignore[no-untyped-call]
    return out


def all_to_all(x: Tensor, received: list[int], sent: list[int], group: str) -> Tensor:
    """Sends rows to ranks and receives theirs.

    Args:
        x: rows, sorted by the rank that they go to.
        received: rows from each rank.
        sent: rows to each rank.
        group: the ranks.
    """
    out: Tensor = _AllToAll.apply(x, received, sent, group)  # type: ignore[no-untyped-call]
    return out
