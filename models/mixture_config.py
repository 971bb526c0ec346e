"""What all mixtures of experts are configured by; a family's config adds its own fields."""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from regrow.errors import ConfigError
from regrow.models.config import DecoderConfig, divisors

__all__ = ["Balance", "MixtureConfig", "ScoreFunction"]

# In `since` of fields that came after 0.1.0.
_LATER = {"since": "0.2.0"}


class Balance(Enum):
    """What keeps the experts evenly used.

    Attributes:
        bias: the bias of experts with few tokens rises after each step (DeepSeek-V3, arXiv:2412.19437, 2.1.2).
        auxiliary: a loss over each sequence is added.
        none: nothing does.
    """

    bias = "bias"
    auxiliary = "auxiliary"
    none = "none"


class ScoreFunction(Enum):
    """What makes scores of a router's logits.

    Attributes:
        softmax: over all experts, so that their scores sum to 1.
        sigmoid: for each expert by itself.
    """

    softmax = "softmax"
    sigmoid = "sigmoid"


@dataclass(kw_only=True, slots=True)
class MixtureConfig(DecoderConfig):
    """A decoder whose feed-forward layers are mixtures of experts.

    Attributes:
        n_experts: experts a layer.
        experts_per_token: experts that see a token.
        expert_ffn_dim: an expert's width.
        norm_topk_prob: a token's weights for its experts sum to 1.
        balance: what keeps the experts evenly used.
        bias_update_speed: what `bias` adds or takes after a step.
        auxiliary_coefficient: weight of the loss with `auxiliary`.
        score_func: what makes scores of a router's logits.
        n_shared_experts: experts beside those, which see every token; they are one matrix of their widths together. 0
            for none.
        n_expert_groups: groups of equally many neighbouring experts, of which a token chooses some first.
        topk_groups: how many groups a token chooses (DeepSeek-V3, arXiv:2412.19437, 2.1.2: of a group, the sum of its
            two best experts' scores counts).
        route_scale: factor of a token's weights.
    """

    n_experts: int = MISSING
    experts_per_token: int = MISSING
    expert_ffn_dim: int = MISSING
    norm_topk_prob: bool = True
    balance: Balance = Balance.bias
    bias_update_speed: float = 1e-3
    auxiliary_coefficient: float = 1e-3
    score_func: ScoreFunction = field(default=ScoreFunction.softmax, metadata=_LATER)
    n_shared_experts: int = field(default=0, metadata=_LATER)
    n_expert_groups: int = field(default=1, metadata=_LATER)
    topk_groups: int = field(default=1, metadata=_LATER)
    route_scale: float = field(default=1.0, metadata=_LATER)

    @property
    def ffn_dim(self) -> int:
        """Width of the experts that see every token, together; 0 where there are none."""
        return self.n_shared_experts * self.expert_ffn_dim

    def check_experts(self) -> None:
        """Raises ConfigError where the fields of the mixture contradict each other."""
        for problem in (self._numbers(), self._groups()):
            if problem is not None:
                raise ConfigError(problem)

    def _numbers(self) -> str | None:
        if self.experts_per_token > self.n_experts:
            return (
                f"model.experts_per_token must be at most model.n_experts ({self.n_experts}), but is "
                f"{self.experts_per_token}; use {self.n_experts} or less"
            )
        for name, remedy in (("bias_update_speed", 1e-3), ("auxiliary_coefficient", 1e-3), ("n_shared_experts", 1)):
            if getattr(self, name) < 0:
                return f"model.{name} must be at least 0, but is {getattr(self, name)}; use {remedy}"
        if not 0 < self.route_scale < float("inf"):
            return f"model.route_scale must be above 0 and finite, but is {self.route_scale}; use 1.0"
        return None

    def _groups(self) -> str | None:
        if self.n_expert_groups < 1 or self.n_experts % self.n_expert_groups:
            nearest = divisors(self.n_experts, around=self.n_expert_groups)
            return (
                f"model.n_expert_groups must divide model.n_experts ({self.n_experts}), but is "
                f"{self.n_expert_groups}; use {nearest}"
            )
        if not 1 <= self.topk_groups <= self.n_expert_groups:
            return (
                f"model.topk_groups must be within 1 and model.n_expert_groups ({self.n_expert_groups}), but is "
                f"{self.topk_groups}; use {min(max(1, self.topk_groups), self.n_expert_groups)}"
            )
        eligible = self.n_experts // self.n_expert_groups * self.topk_groups
        if self.experts_per_token > eligible:
            return (
                f"model.experts_per_token must be at most the experts of model.topk_groups groups ({eligible}), but "
                f"is {self.experts_per_token}; use {eligible} or less"
            )
        return None
