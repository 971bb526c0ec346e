"""Blocks with experts, compiled and recomputed: whole on one rank, in pieces where ranks meet within them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from regrow.models.moe import MixtureBlock
from regrow.trainer.parallel.apply import _checkpoint_activations, _compile
from tests.unit.models.test_moe import DEEPSEEK, config_of


def a_block(*overrides: str) -> MixtureBlock:
    torch.manual_seed(0)
    block = MixtureBlock(config_of(*overrides), lambda x, _: x, qk_norm=True)
    block.moe.init_buffers(torch.device("cpu"))
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return block


def of(block: MixtureBlock) -> Any:
    """A model of one block."""
    return SimpleNamespace(blocks=lambda: [block])


def results(block: MixtureBlock) -> list[Tensor]:
    """Of a forward and backward pass: output, gradients, and the load."""
    torch.manual_seed(1)
    x, rope = torch.randn(2, 12, 32, requires_grad=True), torch.zeros(12, 8)
    out = block(x, rope, None, torch.ones(2, 12, dtype=torch.bool))
    grads = torch.autograd.grad(out.square().sum(), [x, *block.parameters()])
    return [out, *grads, block.moe.load.clone()]


# The compiler's own, which it hides where warnings are no errors.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated", "ignore:The .grad attribute of a Tensor")
@pytest.mark.slow
@pytest.mark.parametrize(("whole", "graphs"), [(True, 1), (False, 4)])
@pytest.mark.parametrize("recomputed", ["none", "full", "selective"])
def test_compiled_blocks_are_so_many_graphs_and_compute_the_same(whole: bool, graphs: int, recomputed: str) -> None:
    options = [*DEEPSEEK, "model.balance=auxiliary"]
    expected = results(a_block(*options))
    block, backend = a_block(*options), CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    if recomputed != "none":
        _checkpoint_activations(of(block), selective=recomputed == "selective", whole=whole)
    _compile(of(block), backend, None, whole=whole)  # type: ignore[arg-type]
    for found, wanted in zip(results(block), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert backend.frame_count == graphs


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("selective", [True, False])
def test_recomputed_blocks_change_no_bit_and_count_once(whole: bool, selective: bool) -> None:
    block = a_block(*DEEPSEEK)
    _checkpoint_activations(of(block), selective=selective, whole=whole)
    for found, wanted in zip(results(block), results(a_block(*DEEPSEEK)), strict=True):
        assert torch.equal(found, wanted)
