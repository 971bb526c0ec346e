"""The fields that every language model has; a family adds its own in `models/<family>/config.py`."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from omegaconf import MISSING

from regrow.errors import ConfigError

__all__ = ["DecoderConfig", "ModelConfig", "divisors"]


@dataclass(kw_only=True, slots=True)
class ModelConfig(ABC):
    """A language model's dimensions.

    Attributes:
        _target_: the class that is built from this config.
        name: the variant, for instance `llama3_8b`; part of a run's default name.
        vocab_size: rows of the embedding, at least the tokenizer's size.
        max_seq_len: the longest sequence, in tokens, that the position encoding was made for.
        hf_assets_path: a Hugging Face folder of this model: where its weights are loaded from with
            `checkpoint.initial_load_in_hf`, and where tokenizer and config files come from at export.
        load_weights: a fresh run starts from the weights in `hf_assets_path`.
    """

    _target_: str = MISSING
    name: str = MISSING
    vocab_size: int = MISSING
    max_seq_len: int = MISSING
    hf_assets_path: str | None = None
    load_weights: bool = False

    @abstractmethod
    def check(self) -> None:
        """Raises ConfigError, in one sentence, where the dimensions contradict each other."""


@dataclass(kw_only=True, slots=True)
class DecoderConfig(ModelConfig):
    """What the decoders here have in common: RMSNorm, RoPE, grouped-query attention, SwiGLU.

    Attributes:
        dim: width of the residual stream.
        n_layers: transformer blocks.
        n_heads: query heads.
        n_kv_heads: key and value heads, a divisor of `n_heads`.
        norm_eps: added to the mean square in RMSNorm.
        rope_theta: RoPE's base.
        tied_embeddings: the output layer is the embedding's matrix.
    """

    dim: int = MISSING
    n_layers: int = MISSING
    n_heads: int = MISSING
    n_kv_heads: int = MISSING
    norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    tied_embeddings: bool = False

    @property
    def head_width(self) -> int:
        """Elements of one head."""
        return self.dim // self.n_heads

    @property
    def n_experts(self) -> int:
        """Experts of each layer; 0 for a dense model. A family with experts has a field of this name."""
        return 0

    @property
    def ffn_dim(self) -> int:
        """Width of the layers that see every token; 0 where there are none. A dense family has this as a field."""
        return 0

    def check_dimensions(self, *others: str) -> None:
        """Raises ConfigError where the shared dimensions, or one of the `others` below 1, are impossible."""
        for name in ("vocab_size", "max_seq_len", "dim", "n_layers", "n_heads", "n_kv_heads", *others):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name} must be at least 1, but is {getattr(self, name)}; set it higher")
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"model.n_kv_heads must divide model.n_heads ({self.n_heads}), but is {self.n_kv_heads}; "
                f"use {divisors(self.n_heads, around=self.n_kv_heads)}"
            )


def divisors(n: int, around: int) -> str:
    """The divisors of `n` nearest to `around`, as words for an error message."""
    nearest = sorted((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - around))[:3]
    return " or ".join(str(d) for d in sorted(nearest))
