"""The global order of samples: a pure function of (seed, number of windows, position).

Position p of the endless sequence is window perm(p mod n) of epoch p div n; perm is a Feistel network over
the epoch's seed, walked until it lands below n (Black and Rogaway 2002, "Ciphers with arbitrary finite
domains"), so that no index array is ever made. Global batch b is positions [b·B, (b+1)·B).
"""

import hashlib

import numpy as np
import numpy.typing as npt

__all__ = ["rank_rows", "window_ids"]

Ids = npt.NDArray[np.int64]
_ROUNDS = 6


def _round_keys(seed: int, epoch: int) -> npt.NDArray[np.uint64]:
    digest = hashlib.blake2b(f"order\0{seed}\0{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(positions: Ids, n: int, seed: int, epoch: int) -> Ids:
    """A bijection of [0, n) applied to `positions`, int64 of any length."""
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    keys = _round_keys(seed, epoch)
    x = positions.astype(np.uint64)
    walking = np.ones(len(x), dtype=bool)
    while walking.any():
        left, right = x[walking] >> half, x[walking] & low
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & low)
        x[walking] = (left << half) | right
        walking = x >= np.uint64(n)
    return x.astype(np.int64)


def window_ids(positions: Ids, n: int, seed: int) -> Ids:
    """The windows at these positions of the endless sequence, int64 of the same length.

    Args:
        positions: from 0 on; epochs may be straddled.
        n: windows in the split, at least 1.
        seed: of the order.
    """
    epochs = positions // n
    out = np.empty(len(positions), dtype=np.int64)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        out[chosen] = permute(positions[chosen] - epoch * n, n, seed, int(epoch))
    return out


def rank_rows(total: int, rank: int, ranks: int) -> tuple[int, int]:
    """The rows of a global batch of `total` that a rank takes, as [start, stop); sizes differ by one at most."""
    return rank * total // ranks, (rank + 1) * total // ranks
