"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) with Llama 3.1's frequency scaling.

Shapes: B batch, T positions, N heads, H head width, R = H / 2. Pairs of neighbouring elements are rotated, as in
Meta's code; Hugging Face pairs element i with i + H/2 instead, which is a permutation of the projection's rows.
"""

import math

import torch
from torch import Tensor

__all__ = ["apply_rope", "apply_rope_halves", "rope_frequencies", "rope_table"]


def rope_frequencies(
    head_dim: int,
    theta: float,
    *,
    factor: float = 1.0,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    original_max_seq_len: int = 8192,
) -> Tensor:
    """Angles per position, float32 `(head_dim / 2,)`.

    Llama 3.1's rule: wavelengths shorter than `original_max_seq_len / high_freq_factor` stay, those longer than
    `original_max_seq_len / low_freq_factor` are divided by `factor`, those between are blended linearly.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if factor == 1.0:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    smooth = (original_max_seq_len / wavelengths - low_freq_factor) / (high_freq_factor - low_freq_factor)
    smooth = smooth.clamp(0.0, 1.0)
    return frequencies * (smooth + (1.0 - smooth) / factor)


def rope_table(frequencies: Tensor, length: int) -> Tensor:
    """Cosine and sine of the angles of positions 0 … length - 1, float32 `(length, head_dim / 2, 2)`."""
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    return torch.view_as_real(torch.polar(torch.ones_like(angles), angles))


def apply_rope(x_BTNH: Tensor, table_TR2: Tensor) -> Tensor:
    """Rotates each pair of `x_BTNH` by its position's angle, in float32 or better; the result has x's dtype.

    Args:
        x_BTNH: queries or keys, `(B, T, N, H)`.
        table_TR2: float32 `(T, H / 2, 2)`, the rows of `rope_table` for these positions; `(B, T, H / 2, 2)` where
            sequences have positions of their own.
    """
    pairs = x_BTNH.to(torch.promote_types(x_BTNH.dtype, torch.float32)).reshape(*x_BTNH.shape[:-1], -1, 2)
    if x_BTNH.device.type == "cpu" and not torch.compiler.is_compiling():
        # One pass over memory rather than six, with the same roundings; compilers fuse real numbers alone.
        turned = torch.view_as_complex(pairs) * torch.view_as_complex(table_TR2).unsqueeze(-2)
        return torch.view_as_real(turned).flatten(-2).type_as(x_BTNH)
    cos, sin = table_TR2.unsqueeze(-3).unbind(-1)
    first, second = pairs.unbind(-1)
    return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2).type_as(x_BTNH)


def apply_rope_halves(x_BTNH: Tensor, table_TR2: Tensor) -> Tensor:
    """As `apply_rope`, but element i is rotated with element i + H/2."""
    first, second = x_BTNH.to(torch.promote_types(x_BTNH.dtype, torch.float32)).chunk(2, dim=-1)
    cos, sin = table_TR2.unsqueeze(-3).unbind(-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).type_as(x_BTNH)
