"""A mixture of experts without capacity limits: every token reaches the experts that its router chose.

Shapes: B batch, T positions, D model width, S = B·T tokens, E experts, C experts per token, R = S·C,
F an expert's width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regrow.models.linear import Linear
from regrow.torch_compat import is_in_backward

__all__ = ["Experts", "MixtureOfExperts", "Router", "add_loss"]


class _AddLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss.detach()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones_like(ctx.like)


def add_loss(x: Tensor, loss: Tensor) -> Tensor:
    """`x` itself; the backward pass also goes through `loss`, as if it were added to the training loss."""
    out: Tensor = _AddLoss.apply(x, loss)  # type: ignore[no-untyped-call]
    return out


class Router(nn.Module):
    """Chooses each token's experts: softmax over all, the best C by score plus bias, weighted by score."""

    def __init__(self, dim: int, n_experts: int, per_token: int, *, normalise: bool) -> None:
        super().__init__()
        self.per_token, self.normalise = per_token, normalise
        self.gate = Linear(dim, n_experts)

    def forward(self, x_SD: Tensor, bias_E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores of all experts `(S, E)`, and weights and numbers of the chosen ones `(S, C)`."""
        logits_SE = self.gate(x_SD)
        scores_SE = logits_SE.to(torch.promote_types(logits_SE.dtype, torch.float32)).softmax(-1)
        chosen_SC = (scores_SE.detach() + bias_E).topk(self.per_token, dim=-1).indices
        weights_SC = scores_SE.gather(1, chosen_SC)
        if self.normalise:
            weights_SC = weights_SC / weights_SC.sum(-1, keepdim=True)
        return scores_SE, weights_SC, chosen_SC


class Experts(nn.Module):
    """SwiGLU experts, their weights stacked: `w1` and `w3` `(E, F, D)`, `w2` `(E, D, F)`."""

    def __init__(self, dim: int, ffn_dim: int, n_experts: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(n_experts, ffn_dim, dim))
        self.w2 = nn.Parameter(torch.empty(n_experts, dim, ffn_dim))
        self.w3 = nn.Parameter(torch.empty(n_experts, ffn_dim, dim))

    def forward(self, x_SD: Tensor, expert_S: Tensor) -> Tensor:
        """Runs rows that are sorted by expert; `expert_S` holds each row's expert, in any order."""
        return self.compute(x_SD, expert_S, self.w1, self.w2, self.w3)

    @staticmethod
    def compute(x_SD: Tensor, expert_S: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
        """The same with given weights."""
        ends_E = torch.bincount(expert_S, minlength=w1.shape[0]).cumsum(0).to(torch.int32)
        gate_SF = _grouped(x_SD, w1, ends_E)
        return _grouped(F.silu(gate_SF) * _grouped(x_SD, w3, ends_E), w2, ends_E)


def _grouped(x_SI: Tensor, w_EOI: Tensor, ends_E: Tensor) -> Tensor:
    w_EOI = w_EOI.to(x_SI.dtype)
    if x_SI.shape[0] == 0:
        # No rows: a result through which input and weights still get a gradient, zero.
        return x_SI @ w_EOI[0].T
    if x_SI.dtype == torch.float64:
        # The grouped product knows no float64, which is there to check numerics.
        starts = [0, *ends_E.tolist()]
        return torch.cat([x_SI[a:b] @ w.T for a, b, w in zip(starts, starts[1:], w_EOI, strict=False)])
    return F.grouped_mm(x_SI, w_EOI.transpose(1, 2), offs=ends_E)


# Rows, each row's expert and the experts' module to the experts' results, row by row.
RunExperts = Callable[[Tensor, Tensor, nn.Module], Tensor]


def run_experts(x_SD: Tensor, expert_S: Tensor, experts: nn.Module) -> Tensor:
    """Sorts rows by expert, runs them, and puts the results back."""
    order_S = expert_S.argsort(stable=True)
    out_SD = experts(x_SD[order_S], expert_S)
    return torch.empty_like(out_SD).index_copy(0, order_S, out_SD)


class MixtureOfExperts(nn.Module):
    """Router and experts.

    Args:
        dim: D.
        ffn_dim: F.
        n_experts: E.
        per_token: C.
        normalise: whether a token's weights sum to 1.
        bias_update_speed: what the bias of an expert changes by after a step; 0 leaves it alone.
        auxiliary: coefficient of the balancing loss (DeepSeek-V3, arXiv:2412.19437, eq. 17 to 20), which is a mean
            over sequences; 0 for none.

    Attributes:
        expert_bias: added to the scores where experts are chosen, float32 `(E,)`.
        load: tokens that chose each expert in training since it was set to 0, int64 `(E,)`.
        loss_scale: what the auxiliary loss of one sequence counts, 1 / sequences of a step.
        sum_counts: sums counts over the ranks that share a sequence.
    """

    expert_bias: Tensor
    load: Tensor

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        n_experts: int,
        per_token: int,
        *,
        normalise: bool,
        bias_update_speed: float,
        auxiliary: float,
    ) -> None:
        super().__init__()
        self.auxiliary, self.bias_update_speed, self.n_experts = auxiliary, bias_update_speed, n_experts
        self.router = Router(dim, n_experts, per_token, normalise=normalise)
        self.experts = Experts(dim, ffn_dim, n_experts)
        self.register_buffer("expert_bias", torch.empty(n_experts, dtype=torch.float32))
        self.register_buffer("load", torch.empty(n_experts, dtype=torch.int64), persistent=False)
        self.loss_scale = 1.0
        self.run_experts: RunExperts = run_experts
        self.sum_counts: Callable[[Tensor], Tensor] = lambda counts: counts

    def init_buffers(self, device: torch.device) -> None:
        """Zeroes."""
        self.expert_bias = torch.zeros(self.n_experts, dtype=torch.float32, device=device)
        # A float32 counts no further than 2^24.
        self.load = torch.zeros(self.n_experts, dtype=torch.int64, device=device)

    def forward(self, x_BTD: Tensor, valid_BT: Tensor | None) -> Tensor:
        x_SD = x_BTD.flatten(0, 1)
        scores_SE, weights_SC, chosen_SC = self.router(x_SD, self.expert_bias)
        per_token = chosen_SC.shape[1]
        # A backward pass that computes the block again must not count a second time.
        if self.training and not is_in_backward():
            self._count(chosen_SC, valid_BT)
        rows_RD = x_SD.repeat_interleave(per_token, dim=0)
        out_RD = self.run_experts(rows_RD, chosen_SC.flatten(), self.experts)
        out_SCD = out_RD.view(-1, per_token, x_SD.shape[1])
        out_SD: Tensor = (out_SCD * weights_SC.to(out_SCD.dtype)[..., None]).sum(1)
        out_BTD = out_SD.view(x_BTD.shape)
        if self.auxiliary > 0 and self.training:
            out_BTD = add_loss(out_BTD, self._balance_loss(scores_SE, chosen_SC, x_BTD.shape[:2], valid_BT))
        return out_BTD

    @torch.no_grad()
    def _count(self, chosen_SC: Tensor, valid_BT: Tensor | None) -> None:
        counts = torch.ones_like(chosen_SC)
        if valid_BT is not None:
            counts *= valid_BT.reshape(-1, 1)
        self.load.scatter_add_(0, chosen_SC.flatten(), counts.flatten())

    def _balance_loss(
        self, scores_SE: Tensor, chosen_SC: Tensor, shape: torch.Size, valid_BT: Tensor | None
    ) -> Tensor:
        """This rank's part of the sequences' losses; counts of shared sequences are those of all their ranks."""
        batch, length = shape
        counted_BT: Tensor = torch.ones(batch, length, dtype=scores_SE.dtype, device=scores_SE.device)
        if valid_BT is not None:
            counted_BT = counted_BT * valid_BT
        chosen_BTE = torch.zeros_like(scores_SE).scatter_(1, chosen_SC, 1.0).view(batch, length, -1)
        with torch.no_grad():
            counts_BE = self.sum_counts((chosen_BTE * counted_BT[..., None]).sum(1))
            # Without dividing by zero for a row of padding.
            tokens_B1 = (counts_BE.sum(-1, keepdim=True) / chosen_SC.shape[1]).clamp(min=1.0)
            fractions_BE = counts_BE * self.n_experts / (chosen_SC.shape[1] * tokens_B1)
        shares_BTE = (scores_SE / scores_SE.sum(-1, keepdim=True)).view(batch, length, -1)
        means_BE = (shares_BTE * counted_BT[..., None]).sum(1) / tokens_B1
        return self.auxiliary * self.loss_scale * (fractions_BE * means_BE).sum()
