"""Which key/value heads a rank of tensor parallelism needs: arithmetic alone.

Query heads are split evenly. A rank needs the key/value heads that its query heads use; where the ranks do not divide
their number, some heads are needed by several ranks.
"""

import math
from dataclasses import dataclass

__all__ = ["KvHeads", "kv_heads_of_rank", "kv_heads_per_rank"]


@dataclass(frozen=True, kw_only=True, slots=True)
class KvHeads:
    """The key/value heads that a rank computes, and how its attention uses them.

    Attributes:
        first: number of the first one in the whole model.
        count: how many follow each other from there.
        shared: whether ranks share heads; alike on all of them.
        repeats: for each group of the rank's query heads, in order, which of the `count` heads it uses. All groups
            are of one size, so that what the rank computes is grouped-query attention; as many on every rank.
    """

    first: int
    count: int
    shared: bool
    repeats: tuple[int, ...]


def kv_heads_of_rank(n_kv_heads: int, ranks: int, rank: int) -> KvHeads:
    """The key/value heads of one rank.

    Args:
        n_kv_heads: of the model; they and the ranks divide the number of query heads.
        ranks: of tensor parallelism.
        rank: one of them.
    """
    # The largest groups of query heads that neither two ranks nor two key/value heads share.
    groups, own = math.lcm(n_kv_heads, ranks), kv_heads_per_rank(n_kv_heads, ranks)
    used = [group * n_kv_heads // groups for group in range(rank * own, (rank + 1) * own)]
    return KvHeads(
        first=used[0],
        count=used[-1] - used[0] + 1,
        shared=n_kv_heads % ranks != 0,
        repeats=tuple(head - used[0] for head in used),
    )


def kv_heads_per_rank(n_kv_heads: int, ranks: int) -> int:
    """The key/value heads that a rank's attention sees, repeated ones counted: the length of `repeats`."""
    return n_kv_heads // math.gcd(n_kv_heads, ranks)
