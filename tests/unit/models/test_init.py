"""First weights are a function of (seed, name, place), whatever draws them."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from regrow.models.init import BLOCK_ELEMENTS, InitRule, fill_shard


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("top", [0, 37])
def test_several_threads_draw_the_same_weights(top: int) -> None:
    columns = 512
    rows = 5 * BLOCK_ELEMENTS // columns + 3
    drawn: list[Tensor] = []
    for number in (1, 3):
        torch.set_num_threads(number)
        # A parameter, which autograd watches in every thread that is not told otherwise.
        own = torch.nn.Parameter(torch.empty(rows - top, columns))
        with torch.no_grad():
            fill_shard(own, name="w", rule=InitRule(std=0.02), global_shape=(rows, columns), offset=(top, 0), seed=5)
        drawn.append(own.detach())
    assert torch.equal(drawn[0], drawn[1])
    assert float(drawn[0].std()) == pytest.approx(0.02, rel=0.01)
