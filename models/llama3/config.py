"""Dimensions of the Llama 3 family."""

from dataclasses import dataclass, field
from typing import ClassVar

from omegaconf import MISSING

from models.config import ModelConfig

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
class Llama3Config(ModelConfig):
    """Llama 3: RMSNorm, RoPE, grouped-query attention, SwiGLU.

    Attributes:
        dim: width of the residual stream.
        n_layers: transformer blocks.
        n_heads: query heads; `dim / n_heads` is a head's width.
        n_kv_heads: key and value heads, a divisor of `n_heads`.
        ffn_dim: width of the feed-forward layer.
        norm_eps: added to the mean square in RMSNorm.
        rope_theta: RoPE's base.
        rope_scaling: Llama 3.1's stretching.
        tied_embeddings: the output layer is the embedding's matrix.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("model", "llama3_schema")

    _target_: str = "models.llama3.model.Llama3"
    dim: int = MISSING
    n_layers: int = MISSING
    n_heads: int = MISSING
    n_kv_heads: int = MISSING
    ffn_dim: int = MISSING
    norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    tied_embeddings: bool = False

    def check(self) -> None:
        """Raises ValueError where the dimensions contradict each other."""
        for name in ("vocab_size", "max_seq_len", "dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be at least 1, but is {getattr(self, name)}; set it higher")
        if self.dim % self.n_heads:
            raise ValueError(
                f"model.n_heads must divide model.dim ({self.dim}), but is {self.n_heads}; "
                f"use {_divisors(self.dim, around=self.n_heads)}"
            )
        if (self.dim // self.n_heads) % 2:
            raise ValueError(
                f"model.dim / model.n_heads must be even for RoPE, but is {self.dim // self.n_heads}; "
                "change model.n_heads"
            )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"model.n_kv_heads must divide model.n_heads ({self.n_heads}), but is {self.n_kv_heads}; "
                f"use {_divisors(self.n_heads, around=self.n_kv_heads)}"
            )


def _divisors(n: int, around: int) -> str:
    """The divisors of `n` nearest to `around`, as words for an error message."""
    nearest = sorted((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - around))[:3]
    return " or ".join(str(d) for d in sorted(nearest))
