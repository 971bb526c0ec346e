"""Llama 3 with Meta's parameter names (as in torchtitan and torchtune).

Shapes: B batch, T positions, D model width, N query heads, K key/value heads, H head width, V vocabulary.
"""

import math
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import LanguageModel
from models.init import InitRule
from models.llama3.config import Llama3Config
from models.rope import apply_rope, rope_frequencies, rope_table

__all__ = ["Llama3"]


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) by scaled_dot_product_attention."""

    def __init__(self, config: Llama3Config) -> None:
        super().__init__()
        self.head_dim = config.dim // config.n_heads
        self.grouped = config.n_kv_heads != config.n_heads
        kv_dim = config.n_kv_heads * self.head_dim
        self.wq = nn.Linear(config.dim, config.dim, bias=False)
        self.wk = nn.Linear(config.dim, kv_dim, bias=False)
        self.wv = nn.Linear(config.dim, kv_dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x_BTD: Tensor, rope_TR: Tensor, mask: Tensor | None) -> Tensor:
        q_BTNH = self.wq(x_BTD).unflatten(-1, (-1, self.head_dim))
        k_BTKH = self.wk(x_BTD).unflatten(-1, (-1, self.head_dim))
        v_BTKH = self.wv(x_BTD).unflatten(-1, (-1, self.head_dim))
        out_BNTH = F.scaled_dot_product_attention(
            apply_rope(q_BTNH, rope_TR).transpose(1, 2),
            apply_rope(k_BTKH, rope_TR).transpose(1, 2),
            v_BTKH.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=self.grouped,
        )
        out: Tensor = self.wo(out_BNTH.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, ffn_dim, bias=False)
        self.w2 = nn.Linear(ffn_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, ffn_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


class TransformerBlock(nn.Module):
    """One pre-norm layer."""

    def __init__(self, config: Llama3Config) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config.dim, config.ffn_dim)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x_BTD: Tensor, rope_TR: Tensor, mask: Tensor | None) -> Tensor:
        h_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rope_TR, mask)
        out: Tensor = h_BTD + self.feed_forward(self.ffn_norm(h_BTD))
        return out


@final
class Llama3(LanguageModel):
    """The Llama 3 language model; see `Llama3Config` for its dimensions."""

    rope: Tensor

    def __init__(self, config: Llama3Config) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied_embeddings:
            self.output.weight = self.tok_embeddings.weight
        self.register_buffer("rope", torch.empty(0, dtype=torch.complex64), persistent=False)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        h_BTD = self.tok_embeddings(tokens)
        rope_TR = self.rope[: tokens.shape[1]]
        for layer in self.layers:
            h_BTD = layer(h_BTD, rope_TR, mask)
        logits_BTV: Tensor = self.output(self.norm(h_BTD))
        return logits_BTV

    def init_rules(self) -> dict[str, InitRule]:
        """Normal with 0.02, residual outputs scaled by 1/sqrt(2 · layers) (GPT-2), the output by 1/sqrt(D)."""
        residual = 0.02 / math.sqrt(2 * self.config.n_layers)
        rules: dict[str, InitRule] = {}
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                rules[name] = InitRule(mean=1.0)
            elif name.endswith((".wo.weight", ".w2.weight")):
                rules[name] = InitRule(std=residual)
            elif name == "output.weight":
                rules[name] = InitRule(std=self.config.dim**-0.5)
            else:
                rules[name] = InitRule(std=0.02)
        return rules

    def init_buffers(self, device: torch.device, length: int) -> None:
        c, s = self.config, self.config.rope_scaling
        frequencies = rope_frequencies(
            c.dim // c.n_heads,
            c.rope_theta,
            factor=s.factor,
            low_freq_factor=s.low_freq_factor,
            high_freq_factor=s.high_freq_factor,
            original_max_seq_len=s.original_max_seq_len,
        )
        self.rope = rope_table(frequencies, length).to(device)

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def decays(self, name: str) -> bool:
        is_embedding = name == "tok_embeddings.weight"
        return not is_embedding and not name.endswith("norm.weight")

    def flops_per_token(self, seq_len: int) -> float:
        """6 per matrix weight, plus 12 · layers · D · T for attention (Chowdhery et al. 2022, appendix B)."""
        c = self.config
        head_dim = c.dim // c.n_heads
        attention = 2 * c.dim * c.dim + 2 * c.dim * c.n_kv_heads * head_dim
        matrices = c.n_layers * (attention + 3 * c.dim * c.ffn_dim) + c.dim * c.vocab_size
        return 6.0 * matrices + 12.0 * c.n_layers * c.dim * seq_len
