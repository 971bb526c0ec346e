"""The global order of samples: a pure function of (seed, number of windows, position).

Position p of the endless sequence is window perm(p mod n) of epoch p div n; perm is a Feistel network over
the epoch's seed, walked until it lands below n (Black and Rogaway 2002, "Ciphers with arbitrary finite
domains"), so that no index array is ever made. Global batch b is positions [b·B, (b+1)·B).
"""

import functools
import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["rank_rows", "window_ids"]

Ids = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]
_ROUNDS = 6


@functools.lru_cache(maxsize=256)
def _round_keys(seed: int, epoch: int) -> npt.NDArray[np.uint64]:
    digest = hashlib.blake2b(f"order\0{seed}\0{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@functools.lru_cache(maxsize=64)
def _half_bits(n: int) -> int:
    return max(1, ((n - 1).bit_length() + 1) // 2)


def _permuted(x: UInt64s, sizes: UInt64s, half: UInt64s, keys: UInt64s) -> Ids:
    """Each element by the bijection of its own domain.

    Args:
        x: from 0 to their sizes, uint64 `(count,)`.
        sizes: of the domains.
        half: bits of half a number of the domain.
        keys: of the rounds, `(rounds, count)`.
    """
    low = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & low
    for of_round in keys:
        left, right = right, left ^ (_mix(right + of_round) & low)
    out = (left << half) | right
    beyond = np.flatnonzero(out >= sizes)
    if len(beyond):
        # A number beyond the domain is walked on until it is within.
        out[beyond] = _permuted(out[beyond], sizes[beyond], half[beyond], keys[:, beyond])
    return out.astype(np.int64)


def permute(positions: Ids, n: int, seed: int, epoch: int) -> Ids:
    """A bijection of [0, n) applied to `positions`, int64 of any length."""
    count = len(positions)
    keys = np.repeat(_round_keys(seed, epoch)[:, None], count, axis=1)
    sizes, half = (np.full(count, value, dtype=np.uint64) for value in (n, _half_bits(n)))
    return _permuted(positions.astype(np.uint64), sizes, half, keys)


def window_ids(positions: Ids, sizes: Ids, seeds: Sequence[int], sources: Ids) -> Ids:
    """The windows at these positions of the endless sequences of sources, int64 of the same length.

    Args:
        positions: from 0 on, each within its source's sequence; epochs may be straddled.
        sizes: windows of each source, at least 1 of those that occur, int64 `(sources,)`.
        seeds: of each source's order.
        sources: of each position.
    """
    own = sizes[sources]
    epochs = positions // own
    # One number for an epoch of a source.
    orders, which = np.unique(epochs * len(sizes) + sources, return_inverse=True)
    of_orders = [divmod(order, len(sizes)) for order in orders.tolist()]
    keys = np.stack([_round_keys(seeds[source], epoch) for epoch, source in of_orders], axis=1)
    half = np.array([_half_bits(n) for n in sizes.tolist()], dtype=np.uint64)
    local = (positions - epochs * own).astype(np.uint64)
    return _permuted(local, own.astype(np.uint64), half[sources], keys[:, which])


def rank_rows(total: int, rank: int, ranks: int) -> tuple[int, int]:
    """The rows of a global batch of `total` that a rank takes, as [start, stop); sizes differ by one at most."""
    return rank * total // ranks, (rank + 1) * total // ranks
