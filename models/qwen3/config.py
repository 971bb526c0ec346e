"""Dimensions of the Qwen3 family, dense and with experts."""

from dataclasses import dataclass
from typing import ClassVar

from omegaconf import MISSING

from regrow.errors import ConfigError
from regrow.models.config import DecoderConfig
from regrow.models.mixture_config import Balance, MixtureConfig, ScoreFunction

__all__ = ["Balance", "Qwen3Config", "Qwen3MoeConfig", "ScoreFunction"]


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
class Qwen3MoeConfig(MixtureConfig):
    """Qwen3 with a mixture of experts in every layer; its fields beside these are `MixtureConfig`'s.

    Attributes:
        head_dim: a head's width; `n_heads · head_dim` need not be `dim`.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("model", "qwen3_moe_schema")

    _target_: str = "regrow.models.qwen3.model.Qwen3Moe"
    norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    head_dim: int = MISSING

    @property
    def head_width(self) -> int:
        """Elements of one head."""
        return self.head_dim

    def check(self) -> None:
        """Raises ConfigError where the dimensions contradict each other."""
        self.check_dimensions("head_dim", "n_experts", "experts_per_token", "expert_ffn_dim")
        _check_head(self.head_dim)
        self.check_experts()


def _check_head(head_dim: int) -> None:
    if head_dim % 2:
        raise ConfigError(f"model.head_dim must be even for RoPE, but is {head_dim}; use {head_dim + 1}")
