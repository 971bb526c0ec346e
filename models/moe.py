"""A mixture of experts without capacity limits: every token reaches the experts that its router chose.

Shapes: B batch, T positions, D model width, S = B·T tokens, E experts, G groups of experts, C experts per token,
R = S·C rows, F an expert's width.

Memory, in elements, beside weights and their gradients: between forward and backward pass `R · (D + 3 F)` are kept,
the rows that the experts got and three activations; at the peak there are `R · max(2 D + 4 F, D + 6 F, 3 D + 2 F)`.
The router has `S · E`, and the tokens' own rows are `S · D`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from regrow.models.attention import Mask
from regrow.models.dispatch import Order, order_by_expert, sum_rows, take_choices, take_rows
from regrow.models.experts import Experts
from regrow.models.layers import Attention, FeedForward, RMSNorm, Rotation
from regrow.models.linear import Linear
from regrow.models.mixture_config import Balance, MixtureConfig, ScoreFunction
from regrow.torch_compat import is_in_backward

__all__ = ["Experts", "MixtureBlock", "MixtureOfExperts", "Router", "add_loss"]


class _AddLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grad, torch.ones_like(loss)


def add_loss(x: Tensor, loss: Tensor) -> Tensor:
    """`x` itself; the backward pass also goes through `loss`, as if it were added to the training loss."""
    out: Tensor = _AddLoss.apply(x, loss)  # type: ignore[no-untyped-call]
    return out


class Router(nn.Module):
    """Chooses each token's experts: the best C by score plus bias, weighted by score.

    With groups, the best groups are chosen first, each by the sum of its two best scores plus biases (DeepSeek-V3,
    arXiv:2412.19437, 2.1.2, and its published code).

    Args:
        dim: D.
        n_experts: E.
        per_token: C.
        normalise: whether a token's weights sum to 1, before `scale`.
        score: of a logit.
        groups: G, a divisor of E.
        top_groups: how many groups a token may choose from.
        scale: factor of the weights.
    """

    def __init__(
        self,
        dim: int,
        n_experts: int,
        per_token: int,
        *,
        normalise: bool,
        score: ScoreFunction = ScoreFunction.softmax,
        groups: int = 1,
        top_groups: int = 1,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.per_token, self.normalise, self.score = per_token, normalise, score
        self.groups, self.top_groups, self.scale = groups, top_groups, scale
        self.gate = Linear(dim, n_experts)

    def forward(self, x_SD: Tensor, bias_E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores of all experts `(S, E)`, and weights and numbers of the chosen ones `(S, C)`."""
        logits_SE = self.gate(x_SD)
        logits_SE = logits_SE.to(torch.promote_types(logits_SE.dtype, torch.float32))
        scores_SE = logits_SE.softmax(-1) if self.score is ScoreFunction.softmax else logits_SE.sigmoid()
        biased_SE = scores_SE.detach() + bias_E
        if self.top_groups < self.groups:
            biased_SE = self._of_best_groups(biased_SE)
        chosen_SC = biased_SE.topk(self.per_token, dim=-1).indices
        weights_SC = scores_SE.gather(1, chosen_SC)
        if self.normalise:
            sums_S1 = weights_SC.sum(-1, keepdim=True)
            # A softmax' best are never all zero.
            weights_SC = weights_SC / (sums_S1 if self.score is ScoreFunction.softmax else sums_S1.clamp(min=1e-20))
        if self.scale != 1.0:
            weights_SC = weights_SC * self.scale
        return scores_SE, weights_SC, chosen_SC

    def _of_best_groups(self, biased_SE: Tensor) -> Tensor:
        """The scores, with minus infinity for experts of other groups."""
        biased_SGE = biased_SE.view(len(biased_SE), self.groups, -1)
        best_SG = biased_SGE.topk(min(2, biased_SGE.shape[2]), dim=-1).values.sum(-1)
        chosen_SG = best_SG.topk(self.top_groups, dim=-1).indices
        other_SG = torch.ones_like(best_SG, dtype=torch.bool).scatter(1, chosen_SG, value=False)
        return biased_SGE.masked_fill(other_SG[..., None], -torch.inf).flatten(1)


class Routed(NamedTuple):
    """What a mixture does with its tokens, before the experts.

    Attributes:
        rows_RD: the tokens' rows, sorted by expert.
        weights_R: of each row, float32 or better.
        order: of the rows.
        counts_E: tokens that count and chose each expert, int64; None outside of training.
        loss: this rank's part of the balancing loss, None without one.
    """

    rows_RD: Tensor
    weights_R: Tensor
    order: Order
    counts_E: Tensor | None
    loss: Tensor | None


# The experts' results of rows that are sorted by expert: of rows, their weights, where each expert's end, and the
# experts' module.
RunExperts = Callable[[Tensor, Tensor, Tensor, nn.Module], Tensor]


def _run_here(rows_RD: Tensor, weights_R: Tensor, ends_E: Tensor, experts: nn.Module) -> Tensor:
    out_RD: Tensor = experts(rows_RD, weights_R, ends_E)
    return out_RD


class MixtureOfExperts(nn.Module):
    """Router and experts.

    Args:
        config: of the model; `auxiliary_coefficient` weighs the balancing loss (DeepSeek-V3, arXiv:2412.19437, eq. 17
            to 20), which is a mean over sequences.

    Attributes:
        expert_bias: added to the scores where experts are chosen, float32 `(E,)`.
        load: tokens that chose each expert in training since it was set to 0, int64 `(E,)`.
        bias_update_speed: what the bias of an expert changes by after a step; 0 leaves it alone.
        loss_scale: what the auxiliary loss of one sequence counts, 1 / sequences of a step.
        sum_counts: sums counts over the ranks that share a sequence.
        run_experts: here, or on the ranks that hold the experts.
    """

    expert_bias: Tensor
    load: Tensor

    def __init__(self, config: MixtureConfig) -> None:
        super().__init__()
        self.n_experts = config.n_experts
        self.auxiliary = config.auxiliary_coefficient if config.balance is Balance.auxiliary else 0.0
        self.bias_update_speed = config.bias_update_speed if config.balance is Balance.bias else 0.0
        self.router = Router(
            config.dim,
            config.n_experts,
            config.experts_per_token,
            normalise=config.norm_topk_prob,
            score=config.score_func,
            groups=config.n_expert_groups,
            top_groups=config.topk_groups,
            scale=config.route_scale,
        )
        self.experts = Experts(config.dim, config.expert_ffn_dim, config.n_experts)
        self.register_buffer("expert_bias", torch.empty(config.n_experts, dtype=torch.float32))
        self.register_buffer("load", torch.empty(config.n_experts, dtype=torch.int64), persistent=False)
        self.loss_scale = 1.0
        self.run_experts: RunExperts = _run_here
        self.sum_counts: Callable[[Tensor], Tensor] = lambda counts: counts

    def init_buffers(self, device: torch.device) -> None:
        """Zeroes."""
        self.expert_bias = torch.zeros(self.n_experts, dtype=torch.float32, device=device)
        # A float32 counts no further than 2^24.
        self.load = torch.zeros(self.n_experts, dtype=torch.int64, device=device)

    def forward(self, x_BTD: Tensor, valid_BT: Tensor | None) -> Tensor:
        routed = self.route(x_BTD, valid_BT)
        # A backward pass that computes the block again must not count a second time.
        if routed.counts_E is not None and not is_in_backward():
            self.load.add_(routed.counts_E)
        out_RD = self.run_experts(routed.rows_RD, routed.weights_R, routed.order.ends_E, self.experts)
        return self.combine(out_RD, routed.order, routed.loss).view(x_BTD.shape)

    def route(self, x_BTD: Tensor, valid_BT: Tensor | None) -> Routed:
        """Everything before the experts."""
        x_SD = x_BTD.flatten(0, 1)
        scores_SE, weights_SC, chosen_SC = self.router(x_SD, self.expert_bias)
        order = order_by_expert(chosen_SC, self.n_experts)
        counts_E = self._counts(chosen_SC, valid_BT) if self.training else None
        loss = None
        if self.auxiliary > 0 and self.training:
            loss = self._balance_loss(scores_SE, chosen_SC, x_BTD.shape[:2], valid_BT)
        return Routed(take_rows(x_SD, order), take_choices(weights_SC, order), order, counts_E, loss)

    def combine(self, out_RD: Tensor, order: Order, loss: Tensor | None) -> Tensor:
        """Everything after the experts: `(S, D)`."""
        out_SD = sum_rows(out_RD, order)
        return out_SD if loss is None else add_loss(out_SD, loss)

    @torch.no_grad()
    def _counts(self, chosen_SC: Tensor, valid_BT: Tensor | None) -> Tensor:
        ones_SC = torch.ones_like(chosen_SC)
        if valid_BT is not None:
            ones_SC = ones_SC * valid_BT.reshape(-1, 1)
        zeros_E = torch.zeros(self.n_experts, dtype=torch.int64, device=chosen_SC.device)
        return zeros_E.scatter_add(0, chosen_SC.flatten(), ones_SC.flatten())

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


class MixtureBlock(nn.Module):
    """One pre-norm layer whose feed-forward part is a mixture of experts, beside experts that see every token.

    Args:
        config: of the model.
        rotate: applies RoPE.
        qk_norm: whether queries and keys are normalised per head.
    """

    def __init__(self, config: MixtureConfig, rotate: Rotation, *, qk_norm: bool) -> None:
        super().__init__()
        self.attention = Attention(config, rotate, qk_norm=qk_norm)
        self.moe = MixtureOfExperts(config)
        # Not within the mixture, whose tokens tensor parallelism splits over ranks.
        self.shared_experts = FeedForward(config.dim, config.ffn_dim) if config.n_shared_experts else None
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x_BTD: Tensor, rope_TR2: Tensor, mask: Mask, valid_BT: Tensor | None) -> Tensor:
        h_BTD, normed_BTD = self.before_mixture(x_BTD, rope_TR2, mask)
        out: Tensor = h_BTD + self.moe(normed_BTD, valid_BT)
        return out

    def before_mixture(self, x_BTD: Tensor, rope_TR2: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        """What the mixture's result is added to, and what the mixture gets."""
        h_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rope_TR2, mask)
        normed_BTD = self.ffn_norm(h_BTD)
        if self.shared_experts is not None:
            h_BTD = h_BTD + self.shared_experts(normed_BTD)
        return h_BTD, normed_BTD
