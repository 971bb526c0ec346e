"""Rows to experts and back, without the host looking and the same each time.

The rows that experts get are taken from the tokens directly, in the order of the experts; the way back adds up each
token's rows by their places. Each is the other's gradient, and neither adds to one address from several rows, so both
are deterministic on every device, without atomics or deterministic mode, and a row is in memory once. Where an
expert's rows end is found by a search in the sorted numbers: the host need not know the result's size, as it must for
`bincount`.

Shapes: S tokens, C experts per token, R = S · C rows, E experts, D width.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Order", "number_of_run", "order_by_expert", "sum_rows", "take_choices", "take_rows"]


class Order(NamedTuple):
    """Rows in the order of their experts.

    Attributes:
        choice_R: the number of each row among all choices of all tokens, int64.
        token_R: the token of each row, int64.
        place_SC: where each token's rows are, int64.
        ends_E: the rows up to and including each expert's, int32: the groups of a grouped product.
    """

    choice_R: Tensor
    token_R: Tensor
    place_SC: Tensor
    ends_E: Tensor


def order_by_expert(expert_SC: Tensor, n_experts: int) -> Order:
    """Sorts rows by expert; those of one expert stay in the order of tokens.

    Args:
        expert_SC: int64, the experts of each token.
        n_experts: E.
    """
    # A sort of narrow numbers passes over them fewer times.
    narrow_R = expert_SC.flatten().to(torch.int16 if n_experts <= 1 << 15 else torch.int32)
    sorted_R, choice_R = narrow_R.sort(stable=True)
    numbers_E = torch.arange(n_experts, dtype=narrow_R.dtype, device=narrow_R.device)
    ends_E = torch.searchsorted(sorted_R, numbers_E, right=True, out_int32=True)
    places_R = torch.arange(len(choice_R), device=choice_R.device)
    place_SC = torch.empty_like(choice_R).index_copy(0, choice_R, places_R).view(expert_SC.shape)
    return Order(choice_R, choice_R // expert_SC.shape[1], place_SC, ends_E)


def number_of_run(sizes_N: Tensor, rows: int) -> Tensor:
    """For each of `rows` rows that lie in runs of these sizes, the run's number, int64 `(rows,)`.

    `repeat_interleave` without waiting: the host knows how many rows there are.
    """
    places_R = torch.arange(rows, device=sizes_N.device)
    return torch.searchsorted(sizes_N.cumsum(0), places_R, right=True)


def _sum(rows_RD: Tensor, place_SC: Tensor) -> Tensor:
    if place_SC.shape[1] == 1:
        return rows_RD.index_select(0, place_SC[:, 0])
    if torch.compiler.is_compiling():
        # The compiler fuses this into one kernel.
        return rows_RD[place_SC].sum(1)
    # Sums in float32 or better, and no copy of the rows.
    return F.embedding_bag(place_SC, rows_RD, mode="sum")


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SD: Tensor, token_R: Tensor, place_SC: Tensor) -> Tensor:
        ctx.save_for_backward(place_SC)
        return x_SD.index_select(0, token_R)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        (place_SC,) = ctx.saved_tensors
        return _sum(grad_RD.contiguous(), place_SC), None, None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, token_R: Tensor, place_SC: Tensor) -> Tensor:
        ctx.save_for_backward(token_R)
        return _sum(rows_RD.contiguous(), place_SC)

    @staticmethod
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor, None, None]:
        (token_R,) = ctx.saved_tensors
        return grad_SD.index_select(0, token_R), None, None


def take_choices(weights_SC: Tensor, order: Order) -> Tensor:
    """What each token has for each of its experts, in the order of the experts, `(R,)`."""
    out: Tensor = _TakeRows.apply(weights_SC.reshape(-1, 1), order.choice_R, order.place_SC.view(-1, 1))  # type: ignore[no-untyped-call]
    return out[:, 0]


def take_rows(x_SD: Tensor, order: Order) -> Tensor:
    """The tokens' rows in the order of their experts, `(R, D)`."""
    out: Tensor = _TakeRows.apply(x_SD, order.token_R, order.place_SC)  # type: ignore[no-untyped-call]
    return out


def sum_rows(rows_RD: Tensor, order: Order) -> Tensor:
    """Each token's sum over its rows, `(S, D)`."""
    out: Tensor = _SumRows.apply(rows_RD, order.token_R, order.place_SC)  # type: ignore[no-untyped-call]
    return out
