"""Hashes of raw bytes: one per fixed block, and one over those per item."""

from concurrent.futures import ThreadPoolExecutor

import xxhash

__all__ = ["BLOCK_BYTES", "block_hashes", "item_hash"]

# Part of the format: what is read in part is verified in blocks of this size, counted from the item's start.
BLOCK_BYTES = 1 << 18


def block_hashes(data: memoryview, pool: ThreadPoolExecutor | None = None) -> list[str]:
    """xxh3-128 of each block of an item's raw bytes, in hex."""
    starts = range(0, len(data), BLOCK_BYTES)
    blocks = [data[s : s + BLOCK_BYTES] for s in starts]
    hashes = map(xxhash.xxh3_128_hexdigest, blocks) if pool is None else pool.map(xxhash.xxh3_128_hexdigest, blocks)
    return list(hashes)


def item_hash(blocks: list[str]) -> str:
    """xxh3-128 over an item's block hashes."""
    return str(xxhash.xxh3_128_hexdigest("".join(blocks).encode()))
