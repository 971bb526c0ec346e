"""The fields that every language model has; a family adds its own in `models/<family>/config.py`."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from regrow.errors import ConfigError

__all__ = ["WIDEST_SEGMENT_HEAD", "AttentionKernel", "DecoderConfig", "ModelConfig", "divisors"]

# Of the kernels for documents of several lengths; the width is a multiple of 8.
WIDEST_SEGMENT_HEAD = 256


class AttentionKernel(Enum):
    """What computes attention within documents or a window; elsewhere it is always torch's, for causal attention.

    Attributes:
        auto: `sdpa` on a CPU and in float64; on a GPU `varlen` in bfloat16, and `flex` in float32.
        sdpa: torch's scaled_dot_product_attention with a mask of seq × seq.
        flex: FlexAttention, with a mask of blocks of 128 × 128.
        varlen: FlashAttention, with the documents as sequences of several lengths; bfloat16.
    """

    auto = "auto"
    sdpa = "sdpa"
    flex = "flex"
    varlen = "varlen"


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
        window: tokens that a position sees at most, itself among them (sliding-window attention); 0 is no limit.
        attention: what computes attention within documents or a window; it may change from start to start.
    """

    dim: int = MISSING
    n_layers: int = MISSING
    n_heads: int = MISSING
    n_kv_heads: int = MISSING
    norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    tied_embeddings: bool = False
    window: int = field(default=0, metadata={"since": "0.2.0"})
    attention: AttentionKernel = field(default=AttentionKernel.auto, metadata={"since": "0.2.0"})

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
        if self.window < 0:
            raise ConfigError(f"model.window must be at least 0, but is {self.window}; use 0 for no limit")
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"model.n_kv_heads must divide model.n_heads ({self.n_heads}), but is {self.n_kv_heads}; "
                f"use {divisors(self.n_heads, around=self.n_kv_heads)}"
            )


def divisors(n: int, around: int) -> str:
    """The divisors of `n` nearest to `around`, as words for an error message."""
    nearest = sorted((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - around))[:3]
    return " or ".join(str(d) for d in sorted(nearest))
