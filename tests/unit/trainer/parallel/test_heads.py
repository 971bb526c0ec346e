"""Key/value heads of the ranks of tensor parallelism."""

import math

from hypothesis import given
from hypothesis import strategies as st

from regrow.trainer.parallel.heads import kv_heads_of_rank, kv_heads_per_rank


@given(n_kv_heads=st.integers(1, 24), ranks=st.integers(1, 24), multiple=st.integers(1, 3))
def test_each_query_head_meets_its_own_key_head(n_kv_heads: int, ranks: int, multiple: int) -> None:
    n_heads = math.lcm(n_kv_heads, ranks) * multiple
    per_rank, per_kv_head = n_heads // ranks, n_heads // n_kv_heads
    for rank in range(ranks):
        heads = kv_heads_of_rank(n_kv_heads, ranks, rank)
        assert len(heads.repeats) == kv_heads_per_rank(n_kv_heads, ranks)
        assert set(heads.repeats) == set(range(heads.count))
        group = per_rank // len(heads.repeats)
        for query in range(per_rank):
            assert heads.first + heads.repeats[query // group] == (rank * per_rank + query) // per_kv_head


@given(per_rank=st.integers(1, 8), ranks=st.integers(1, 8))
def test_heads_that_divide_are_not_shared(per_rank: int, ranks: int) -> None:
    for rank in range(ranks):
        heads = kv_heads_of_rank(per_rank * ranks, ranks, rank)
        assert not heads.shared
        assert (heads.first, heads.repeats) == (rank * per_rank, tuple(range(per_rank)))
