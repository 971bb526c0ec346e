"""Each way to share sequences attends like one rank: outputs and gradients in float64, with documents and windows."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from regrow.models.attention_kernels import Blocks
from regrow.models.config import AttentionKernel
from regrow.models.cpu import plain_attention
from regrow.models.documents import describe_documents
from regrow.models.layers import Attention
from regrow.models.llama3.config import Llama3Config
from regrow.models.rope import apply_rope
from regrow.trainer.config import ContextMethod
from regrow.trainer.parallel.attention import prepare_documents
from regrow.trainer.parallel.sequence import ContextGroup, apply_context_parallel
from regrow.trainer.parallel.sequence_chunks import positions_of
from tests.attention import by_segments, plain_mask
from tests.pool import run_distributed

_METHODS = (ContextMethod.ulysses, ContextMethod.gather, ContextMethod.ring)


def _layer(group: ContextGroup, method: ContextMethod) -> Attention:
    config = Llama3Config(
        name="a", dim=32, n_heads=4, n_kv_heads=2, n_layers=1, ffn_dim=8, vocab_size=8, max_seq_len=64
    )
    layer = Attention(config, apply_rope, qk_norm=False)
    apply_context_parallel(layer, group, method)
    return layer


def _differences(balance: bool, window: int, often: float) -> dict[str, float]:
    """The largest differences of outputs and gradients from one rank's, for each method and kernel."""
    world = dist.group.WORLD
    assert world is not None
    rank, ranks, length = dist.get_rank(), dist.get_world_size(), 48
    group = ContextGroup(name=world.group_name, rank=rank, ranks=ranks, balance=balance)
    torch.manual_seed(3)
    numbers = (torch.rand(2, length) < often).long().cumsum(1)
    inputs = [torch.randn(2, length, n, 8, dtype=torch.float64, requires_grad=True) for n in (4, 2, 2)]
    out = plain_attention(inputs[0], inputs[1], inputs[2], plain_mask(numbers, window))
    grad = torch.randn_like(out)
    expected = [out.detach(), *torch.autograd.grad(out, inputs, grad)]
    mine = positions_of(rank, ranks, length, balance=balance)
    documents, found = describe_documents(numbers), {}
    for method in _METHODS:
        layer = _layer(group, method)
        kernels = [AttentionKernel.sdpa, *([AttentionKernel.varlen] if method is not ContextMethod.ring else [])]
        for kernel in kernels:
            own = [x.detach()[:, mine].requires_grad_() for x in inputs]
            prepared = prepare_documents(documents, [window], kernel, (group, method))
            result = layer.attend(own[0], own[1], own[2], prepared, window)
            pairs = zip([result, *torch.autograd.grad(result, own, grad[:, mine])], expected, strict=True)
            found[f"{method.name} {kernel.name}"] = max(_apart(a, b[:, mine]) for a, b in pairs)
        if method is ContextMethod.gather and window == 10:
            plain = [x.detach()[:, mine] for x in inputs]
            prepared = prepare_documents(documents, [window], AttentionKernel.flex, (group, method))
            assert all(isinstance(part, Blocks) for part in prepared.prepared[window])
            found["gather flex"] = _apart(layer.attend(plain[0], plain[1], plain[2], prepared, window), out[:, mine])
    return found


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


def _every_method() -> list[dict[str, float]]:
    # There is no kernel for segments on a CPU.
    pytest.MonkeyPatch().setattr("regrow.models.attention_kernels.varlen_attention", by_segments)
    dist.init_process_group("gloo")
    found = [
        _differences(balance, window, often)
        for balance in (True, False)
        for window in (0, 1, 10)
        for often in (0.0, 0.1, 0.5)
    ]
    dist.destroy_process_group()
    return found


@pytest.mark.slow
def test_every_method_sees_what_one_rank_sees() -> None:
    for found in run_distributed(_every_method, world_size=2):
        assert len(found) == 18
        for case in found:
            assert len(case) >= 5
            assert max(case.values()) < 1e-13, case
