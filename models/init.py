"""Initialisation that does not depend on the layout.

Each parameter is a stack of blocks of rows; a block's values come from a generator seeded by
blake2b(seed, name, block). A rank computes the blocks that its shard touches and no others, so every layout
starts from the same weights, at a cost that falls with the number of ranks.
"""

import hashlib
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BLOCK_ELEMENTS", "InitRule", "fill_shard"]

# Part of the definition of the weights: changing it changes every model's start.
BLOCK_ELEMENTS = 1 << 18


@dataclass(frozen=True, kw_only=True, slots=True)
class InitRule:
    """Values at the start: normal with mean `mean` and standard deviation `std` (0: the constant `mean`)."""

    std: float = 0.0
    mean: float = 0.0


def block_seed(seed: int, name: str, block: int) -> int:
    """The 64-bit seed of one block's generator."""
    digest = hashlib.blake2b(f"{seed}\0{name}\0{block}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def fill_shard(
    local: Tensor,
    *,
    name: str,
    rule: InitRule,
    global_shape: Sequence[int],
    offset: Sequence[int],
    seed: int,
) -> None:
    """Writes a parameter's starting values into one shard of it.

    Args:
        local: this rank's shard, any device; written in place.
        name: the parameter's fully qualified name.
        rule: the distribution.
        global_shape: the whole parameter's shape.
        offset: where the shard begins in each dimension.
        seed: the run's seed.
    """
    if local.numel() == 0:
        return
    if rule.std == 0.0:
        local.fill_(rule.mean)
        return
    row_shape = tuple(global_shape[1:])
    rows_per_block = max(1, BLOCK_ELEMENTS // max(1, math.prod(row_shape)))
    columns = tuple(slice(o, o + n) for o, n in zip(offset[1:], local.shape[1:], strict=True))
    first, last = offset[0], offset[0] + local.shape[0]

    def fill(block: int) -> None:
        start = block * rows_per_block
        stop = min(start + rows_per_block, global_shape[0])
        generator = torch.Generator().manual_seed(block_seed(seed, name, block))
        values = torch.empty((stop - start, *row_shape)).normal_(rule.mean, rule.std, generator=generator)
        low, high = max(start, first), min(stop, last)
        with torch.no_grad():
            local[low - first : high - first].copy_(values[(slice(low - start, high - start), *columns)])

    blocks = range(first // rows_per_block, -(-last // rows_per_block))
    # torch draws with one thread; a block's values are a function of its own seed, so blocks may be drawn at once.
    threads = min(torch.get_num_threads(), len(blocks))
    if threads == 1:
        for block in blocks:
            fill(block)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(fill, blocks))
