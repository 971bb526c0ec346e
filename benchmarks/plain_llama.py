"""Llama as one would write it in plain PyTorch, for comparison: `nn.Linear`, SDPA, `F.cross_entropy`, torch.compile.

Letters in names of tensors: B rows, T positions, N heads, H head width, D width.
"""

from dataclasses import dataclass
from typing import Any, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PlainLlama", "Shape", "make_step"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A model's dimensions; by default Llama 3.2 1B's."""

    vocab_size: int = 128256
    dim: int = 2048
    n_layers: int = 16
    n_heads: int = 32
    n_kv_heads: int = 8
    ffn_dim: int = 8192


@final
class _Block(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.shape, width = s, s.dim // s.n_heads
        self.wq = nn.Linear(s.dim, s.n_heads * width, bias=False)
        self.wk = nn.Linear(s.dim, s.n_kv_heads * width, bias=False)
        self.wv = nn.Linear(s.dim, s.n_kv_heads * width, bias=False)
        self.wo = nn.Linear(s.n_heads * width, s.dim, bias=False)
        self.w1 = nn.Linear(s.dim, s.ffn_dim, bias=False)
        self.w2 = nn.Linear(s.ffn_dim, s.dim, bias=False)
        self.w3 = nn.Linear(s.dim, s.ffn_dim, bias=False)
        self.attention_norm, self.ffn_norm = (nn.RMSNorm(s.dim, eps=1e-5) for _ in range(2))

    def forward(self, x_BTD: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
        rows, length, _ = x_BTD.shape
        normed = self.attention_norm(x_BTD)
        q, k, v = (
            w(normed).view(rows, length, heads, -1).transpose(1, 2)
            for w, heads in (
                (self.wq, self.shape.n_heads),
                (self.wk, self.shape.n_kv_heads),
                (self.wv, self.shape.n_kv_heads),
            )
        )
        q, k = (x * cos_TH + _turned(x) * sin_TH for x in (q, k))
        out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True, enable_gqa=True)
        x_BTD = x_BTD + self.wo(out.transpose(1, 2).reshape(rows, length, -1))
        normed = self.ffn_norm(x_BTD)
        return x_BTD + cast(Tensor, self.w2(F.silu(self.w1(normed)) * self.w3(normed)))


def _turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


@final
class PlainLlama(nn.Module):
    """The model, with its loss; embeddings are tied."""

    def __init__(self, s: Shape, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(s.vocab_size, s.dim)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(_Block(s) for _ in range(s.n_layers))
        self.norm = nn.RMSNorm(s.dim, eps=1e-5)
        width = s.dim // s.n_heads
        frequencies = 500000.0 ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
        angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = F.linear(self.norm(x), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def make_step(model: nn.Module, device: torch.device, *, compiled: bool) -> Any:
    """A training step in bfloat16 by autocast, with fused AdamW and clipping at 1; it returns the loss of tokens and
    labels.

    Args:
        model: gives the loss of (tokens, labels).
        device: of the model.
        compiled: by torch.compile, as a whole.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    parameters = list(model.parameters())
    forward: Any = torch.compile(model) if compiled else model

    def step(tokens: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            loss: Tensor = forward(tokens, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step
