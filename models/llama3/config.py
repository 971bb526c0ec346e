"""Dimensions of the Llama 3 family."""

from dataclasses import dataclass, field
from typing import ClassVar

from omegaconf import MISSING

from regrow.errors import ConfigError
from regrow.models.config import DecoderConfig, divisors

__all__ = ["Llama3Config", "RopeScalingConfig"]


@dataclass(kw_only=True, slots=True)
class RopeScalingConfig:
    """Llama 3.1's stretching of RoPE's wavelengths; `factor=1` leaves them alone.

    Attributes:
        factor: how much longer the context became.
        low_freq_factor: wavelengths above `original_max_seq_len / low_freq_factor` are stretched fully.
        high_freq_factor: wavelengths below `original_max_seq_len / high_freq_factor` stay as they are.
        original_max_seq_len: tokens of context before stretching.
    """

    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192


@dataclass(kw_only=True, slots=True)
class Llama3Config(DecoderConfig):
    """Llama 3: RMSNorm, RoPE, grouped-query attention, SwiGLU; a head's width is `dim / n_heads`.

    Attributes:
        ffn_dim: width of the feed-forward layer.
        rope_scaling: Llama 3.1's stretching.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("model", "llama3_schema")

    _target_: str = "regrow.models.llama3.model.Llama3"
    ffn_dim: int = MISSING
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)

    def check(self) -> None:
        """Raises ConfigError where the dimensions contradict each other."""
        if self.n_heads > 0 and self.dim % self.n_heads:
            raise ConfigError(
                f"model.n_heads must divide model.dim ({self.dim}), but is {self.n_heads}; "
                f"use {divisors(self.dim, around=self.n_heads)}"
            )
        self.check_dimensions("ffn_dim")
        if self.head_width % 2:
            raise ConfigError(
                f"model.dim / model.n_heads must be even for RoPE, but is {self.head_width}; change model.n_heads"
            )
