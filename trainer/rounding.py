"""Stochastic rounding to bfloat16 whose bits are a function of (seed, name, step, element), under every layout.

An update smaller than half the distance between two bfloat16 numbers is lost where it is rounded to the nearest one.
Rounded up with the probability that is its share of that distance, it arrives on average (Gupta et al. 2015,
arXiv:1502.02551). The random bits come from a hash of where an element lies in the whole parameter, so there is no
generator, no state to save, and no difference between a shard and the whole.

Everything is elementwise and made of 32-bit integers and floats, which a GPU's compiler joins into one kernel.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Coordinates", "coordinates_of", "random_words", "round_to_bfloat16", "words_of_name"]

_LOW_16 = 0xFFFF


@dataclass(frozen=True, kw_only=True, slots=True)
class Coordinates:
    """Where the elements of a shard lie in the whole parameter, seen as a matrix whose rows are its last dimension.

    Attributes:
        rows: int32 `(rows, 1)`, numbers of the shard's rows.
        columns: int32 `(columns,)`, numbers of its columns.
    """

    rows: Tensor
    columns: Tensor


def coordinates_of(
    shape: Sequence[int], offset: Sequence[int], whole: Sequence[int], device: torch.device
) -> Coordinates:
    """The coordinates of a shard.

    Args:
        shape: of the shard.
        offset: where it begins in each dimension.
        whole: the parameter's shape.
        device: of the result.
    """
    rows = torch.zeros((), dtype=torch.int32, device=device)
    for dim in range(len(shape) - 1):
        here = torch.arange(offset[dim], offset[dim] + shape[dim], dtype=torch.int32, device=device)
        rows = rows[..., None] + here * math.prod(whole[dim + 1 : -1])
    start, count = (offset[-1], shape[-1]) if shape else (0, 1)
    columns = torch.arange(start, start + count, dtype=torch.int32, device=device)
    return Coordinates(rows=rows.reshape(-1, 1), columns=columns)


def words_of_name(seed: int, name: str, device: torch.device) -> Tensor:
    """Two words that tell a run's parameters apart, int32 `(2,)`."""
    digest = hashlib.blake2b(f"{seed}\0{name}\0rounding".encode(), digest_size=8).digest()
    return torch.frombuffer(bytearray(digest), dtype=torch.int32).to(device)


def random_words(at: Coordinates, words: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """64 random bits for each element, two int32 of the coordinates' shape.

    Args:
        at: the elements' place.
        words: of the parameter, see `words_of_name`.
        step: int32 scalar.

    The hash is pcg4d (Jarzynski and Olano 2020, "Hash Functions for GPU Rendering", JCGT 9.3), of (row, column, step
    and first word, second word); int32 multiplies and adds as uint32 does.
    """
    x, y = at.rows * 1664525 + 1013904223, at.columns * 1664525 + 1013904223
    z, w = (step ^ words[0]) * 1664525 + 1013904223, words[1] * 1664525 + 1013904223
    x = x + y * w
    y = y + z * x
    z = z + x * y
    w = w + y * z
    x, y, z, w = (v ^ ((v >> 16) & _LOW_16) for v in (x, y, z, w))
    x = x + y * w
    y = y + z * x
    z = z + x * y
    w = w + y * z
    return z, w


def round_to_bfloat16(value: Tensor, bits: Tensor) -> Tensor:
    """One of the two bfloat16 numbers beside each value: the one farther from 0 with the probability that is the
    value's share of the way there.

    Args:
        value: float32.
        bits: int32, of which the low 16 bits are the random ones.
    """
    whole = value.view(torch.int32)
    rounded = ((whole + (bits & _LOW_16)) & ~_LOW_16).view(torch.float32)
    # Carries would turn some NaNs into numbers.
    return torch.where(value.isfinite(), rounded, value).to(torch.bfloat16)
