"""The blocks of the decoders here, and the decoder itself, with Meta's parameter names (as in torchtitan).

Shapes: B batch, T positions, D model width, N query heads, K key/value heads, H head width, V vocabulary, R = H / 2.
"""

import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regrow.models.attention import Mask, attend
from regrow.models.base import LanguageModel, OutputLoss
from regrow.models.config import DecoderConfig
from regrow.models.cpu import Kind, is_used, rms_norm
from regrow.models.init import InitRule
from regrow.models.linear import Linear
from regrow.models.rope import rope_table

__all__ = ["Attention", "Decoder", "DecoderBlock", "FeedForward", "RMSNorm", "attend"]

Rotation = Callable[[Tensor, Tensor], Tensor]
_EMBEDDING = "tok_embeddings.weight"
_OUTPUT = "output.weight"


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        if is_used(Kind.norm, (x.numel() // x.shape[-1], x.shape[-1]), x, self.weight):
            return rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Projections, rotation and attention; queries and keys are normalised per head where `qk_norm` says so.

    The number of heads is read from the projections' outputs, so that a rank may hold some of them. A layer may be
    given another window than the model's.
    """

    def __init__(self, config: DecoderConfig, rotate: Rotation, *, qk_norm: bool, window: int | None = None) -> None:
        super().__init__()
        self.head_dim, self.rotate, self.attend = config.head_width, rotate, attend
        self.window = config.window if window is None else window
        q_dim, kv_dim = config.n_heads * self.head_dim, config.n_kv_heads * self.head_dim
        self.wq = Linear(config.dim, q_dim)
        self.wk = Linear(config.dim, kv_dim)
        self.wv = Linear(config.dim, kv_dim)
        self.wo = Linear(q_dim, config.dim)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if qk_norm else None

    def forward(self, x_BTD: Tensor, rope_TR2: Tensor, mask: Mask) -> Tensor:
        q_BTNH = self.wq(x_BTD).unflatten(-1, (-1, self.head_dim))
        k_BTKH = self.wk(x_BTD).unflatten(-1, (-1, self.head_dim))
        v_BTKH = self.wv(x_BTD).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        q_BTNH, k_BTKH = self.rotate(q_BTNH, rope_TR2), self.rotate(k_BTKH, rope_TR2)
        out_BTNH = self.attend(q_BTNH, k_BTKH, v_BTKH, mask, self.window)
        out: Tensor = self.wo(out_BTNH.flatten(2))
        return out


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.w1 = Linear(dim, ffn_dim)
        self.w2 = Linear(ffn_dim, dim)
        self.w3 = Linear(dim, ffn_dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


class DecoderBlock(nn.Module):
    """One pre-norm layer with a dense feed-forward part."""

    def __init__(self, config: DecoderConfig, ffn_dim: int, rotate: Rotation, *, qk_norm: bool) -> None:
        super().__init__()
        self.attention = Attention(config, rotate, qk_norm=qk_norm)
        self.feed_forward = FeedForward(config.dim, ffn_dim)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x_BTD: Tensor, rope_TR2: Tensor, mask: Mask, valid_BT: Tensor | None) -> Tensor:
        h_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rope_TR2, mask)
        out: Tensor = h_BTD + self.feed_forward(self.ffn_norm(h_BTD))
        return out


class Decoder(LanguageModel):
    """Embedding, blocks, norm and output; a family gives the block and the frequencies of RoPE."""

    config: DecoderConfig
    keeps_keys = True
    rope: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        config.check()
        # A family declares its own type of it.
        self.config = config
        self.has_input = self.has_output = True
        # Given its memory: torch would draw weights, for which it loads its compiler on the meta device.
        weight = torch.empty(config.vocab_size, config.dim)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim, _weight=weight)
        self.layers = nn.ModuleDict({str(i): self.make_block() for i in range(config.n_layers)})
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = Linear(config.dim, config.vocab_size)
        if config.tied_embeddings:
            self.output.weight = self.tok_embeddings.weight
        self.register_buffer("rope", torch.empty(0, dtype=torch.float32), persistent=False)

    @abstractmethod
    def make_block(self) -> nn.Module:
        """A layer, called as `block(x, rope, mask, valid)`."""

    @abstractmethod
    def frequencies(self) -> Tensor:
        """RoPE's angles per position, float32 `(head_dim / 2,)`."""

    @abstractmethod
    def layer_weights(self) -> float:
        """Weights of a layer's matrices that one token meets."""

    def forward(
        self,
        tokens: Tensor,
        mask: Mask = None,
        positions: Tensor | None = None,
        valid: Tensor | None = None,
        output_loss: OutputLoss | None = None,
    ) -> Tensor:
        h_BTD = self.tok_embeddings(tokens) if self.has_input else tokens
        if self.compute_dtype is not None:
            h_BTD = h_BTD.to(self.compute_dtype)
        rope_TR2 = self.rope[: tokens.shape[1]] if positions is None else self.rope[positions]
        for layer in self.layers.values():
            h_BTD = layer(h_BTD, rope_TR2, mask, valid)
        if not self.has_output:
            return h_BTD
        h_BTD = self.norm(h_BTD)
        out: Tensor = self.output(h_BTD) if output_loss is None else output_loss(h_BTD, self.output)
        return out

    def init_rules(self) -> dict[str, InitRule]:
        """Normal with 0.02, residual outputs scaled by 1/sqrt(2 · layers) (GPT-2), the output by 1/sqrt(D)."""
        residual = 0.02 / math.sqrt(2 * self.config.n_layers)
        rules: dict[str, InitRule] = {}
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                rules[name] = InitRule(mean=1.0)
            elif name.endswith((".wo.weight", ".w2.weight", ".experts.w2")):
                rules[name] = InitRule(std=residual)
            elif name == _OUTPUT:
                rules[name] = InitRule(std=self.config.dim**-0.5)
            else:
                rules[name] = InitRule(std=0.02)
        return rules

    def init_buffers(self, device: torch.device, length: int) -> None:
        self.rope = rope_table(self.frequencies(), length).to(device)

    def blocks(self) -> list[nn.Module]:
        return list(self.layers.values())

    def part(self, layers: Sequence[int], *, first: bool, last: bool) -> Self:
        part = copy.copy(self)
        # What the copy registers (hooks, buffers, modules) is its own.
        part.__dict__ |= {name: copy.copy(v) for name, v in self.__dict__.items() if isinstance(v, dict | set)}
        part.has_input, part.has_output = first and self.has_input, last and self.has_output
        part.layers = nn.ModuleDict({str(i): self.layers[str(i)] for i in layers})
        # With tied embeddings the last part has the embedding too: its output layer is that matrix.
        if not part.has_input and not (part.has_output and self.config.tied_embeddings):
            _drop(part, "tok_embeddings")
        if not part.has_output:
            _drop(part, "norm", "output")
        return part

    def decays(self, name: str) -> bool:
        return name != _EMBEDDING and not name.endswith("norm.weight")

    def vocabulary_parameters(self) -> tuple[str, ...]:
        return (_EMBEDDING,) if self.config.tied_embeddings else (_EMBEDDING, _OUTPUT)

    def tied_parameters(self) -> tuple[str, ...]:
        return (_EMBEDDING,) if self.config.tied_embeddings else ()

    def flops_per_token(self, seq_len: int) -> float:
        """6 per matrix weight, plus 12 · layers · heads' width · T for attention (Chowdhery et al. 2022, app. B).

        Of T no more than the window.
        """
        c = self.config
        heads = c.n_heads * c.head_width
        attention = 2 * c.dim * heads + 2 * c.dim * c.n_kv_heads * c.head_width
        matrices = c.n_layers * (attention + self.layer_weights()) + c.dim * c.vocab_size
        return 6.0 * matrices + 12.0 * c.n_layers * heads * min(seq_len, c.window or seq_len)


def _drop(part: nn.Module, *names: str) -> None:
    """Leaves modules out of a part; a part of a part may lack them already."""
    for name in names:
        if name in dict(part.named_children()):
            delattr(part, name)
