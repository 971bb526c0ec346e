"""Orders of rows in Hugging Face's files."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from regrow.models.hf_rows import RopeHalves


def test_halves_become_pairs() -> None:
    rows = torch.arange(8)[:, None]
    assert RopeHalves(2).forward(rows, 8).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@given(heads=st.integers(1, 5), half=st.integers(1, 4), cut=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_a_part_is_that_of_the_whole_both_ways(heads: int, half: int, cut: tuple[float, float]) -> None:
    height, transform = heads * 2 * half, RopeHalves(heads)
    stored = torch.arange(height * 3).view(height, 3)
    whole = transform.forward(stored, height)
    assert torch.equal(transform.inverse(whole, height), stored)
    low, high = sorted(int(c * height) for c in cut)
    first, last = transform.needed((low, high), height)
    assert first <= low <= high <= last
    assert torch.equal(transform.forward(stored[first:last], height)[low - first : high - first], whole[low:high])
    assert torch.equal(transform.inverse(whole[first:last], height)[low - first : high - first], stored[low:high])
