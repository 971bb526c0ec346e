"""Dimensions of the Qwen3 family, dense and with experts."""

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from omegaconf import MISSING

from regrow.errors import ConfigError
from regrow.models.config import DecoderConfig

__all__ = ["Balance", "Qwen3Config", "Qwen3MoeConfig"]


class Balance(Enum):
    """What keeps the experts evenly used.

    `bias` raises the bias of experts with few tokens after each step (DeepSeek-V3, arXiv:2412.19437, 2.1.2);
    `auxiliary` adds a loss over each sequence; `none` leaves them alone.
    """

    bias = "bias"
    auxiliary = "auxiliary"
    none = "none"


@dataclass(kw_only=True, slots=True)
class Qwen3Config(DecoderConfig):
    """Dense Qwen3: as Llama 3, with RMSNorm on each query and key head and a head width of its own.

    Attributes:
        head_dim: a head's width; `n_heads · head_dim` need not be `dim`.
        ffn_dim: width of the feed-forward layer.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("model", "qwen3_schema")

    _target_: str = "regrow.models.qwen3.model.Qwen3"
    norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    head_dim: int = MISSING
    ffn_dim: int = MISSING

    @property
    def head_width(self) -> int:
        """Elements of one head."""
        return self.head_dim

    def check(self) -> None:
        """Raises ConfigError where the dimensions contradict each other."""
        self.check_dimensions("head_dim", "ffn_dim")
        _check_head(self.head_dim)


@dataclass(kw_only=True, slots=True)
class Qwen3MoeConfig(DecoderConfig):
    """Qwen3 with a mixture of experts in every layer.

    Attributes:
        head_dim: a head's width; `n_heads · head_dim` need not be `dim`.
        n_experts: experts a layer.
        experts_per_token: how many of them see a token.
        expert_ffn_dim: an expert's width.
        norm_topk_prob: a token's weights for its experts sum to 1.
        balance: see `Balance`.
        bias_update_speed: what `bias` adds or takes after a step.
        auxiliary_coefficient: weight of the loss with `auxiliary`.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("model", "qwen3_moe_schema")

    _target_: str = "regrow.models.qwen3.model.Qwen3Moe"
    norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    head_dim: int = MISSING
    n_experts: int = MISSING
    experts_per_token: int = MISSING
    expert_ffn_dim: int = MISSING
    norm_topk_prob: bool = True
    balance: Balance = Balance.bias
    bias_update_speed: float = 1e-3
    auxiliary_coefficient: float = 1e-3

    @property
    def head_width(self) -> int:
        """Elements of one head."""
        return self.head_dim

    def check(self) -> None:
        """Raises ConfigError where the dimensions contradict each other."""
        self.check_dimensions("head_dim", "n_experts", "experts_per_token", "expert_ffn_dim")
        _check_head(self.head_dim)
        if self.experts_per_token > self.n_experts:
            raise ConfigError(
                f"model.experts_per_token must be at most model.n_experts ({self.n_experts}), but is "
                f"{self.experts_per_token}; use {self.n_experts} or less"
            )
        for name in ("bias_update_speed", "auxiliary_coefficient"):
            if getattr(self, name) < 0:
                raise ConfigError(f"model.{name} must be at least 0, but is {getattr(self, name)}; use 1e-3")


def _check_head(head_dim: int) -> None:
    if head_dim % 2:
        raise ConfigError(f"model.head_dim must be even for RoPE, but is {head_dim}; use {head_dim + 1}")
