"""Ring attention's parts: blocks merged are attention to all keys, and their gradients are its gradients."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from regrow.trainer.parallel.ring import block_attention, block_gradients, ring_attention
from regrow.trainer.parallel.sequence_chunks import positions_of
from tests.pool import run_distributed

pytestmark = pytest.mark.slow


def whole(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention in plain words; heads second."""
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
    out: Tensor = scores.softmax(-1) @ v
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_block_knows_its_sum_and_rows_without_sight(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, 3, 40, 16, dtype=dtype) for _ in range(3))
    mask = torch.rand(2, 1, 40, 40) < 0.3
    mask[:, :, 7] = False
    out, lse = block_attention(q, k, v, mask, causal=False)
    scores = (q.double() @ k.double().transpose(-1, -2) / 4).masked_fill(~mask, -torch.inf)
    assert bool((out[:, :, 7] == 0).all())
    assert bool((lse[:, :, 7] == -torch.inf).all())
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-2, atol=1e-2)
    seeing = [i for i in range(40) if i != 7]
    expected = whole(q.double(), k.double(), v.double(), mask)[:, :, seeing]
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(out[:, :, seeing].double(), expected, rtol=tolerance, atol=tolerance)


def test_gradients_of_blocks_add_up() -> None:
    """Two blocks of keys, one in full sight and one in causal sight."""
    q, k, v = (torch.randn(1, 2, n, 8, dtype=torch.float64, requires_grad=True) for n in (16, 32, 32))
    sight = torch.cat([torch.ones(16, 16), torch.ones(16, 16).tril()], dim=1).bool()
    out = whole(q, k, v, sight)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, (q, k, v), grad)
    q, k, v, out = (x.detach() for x in (q, k, v, out))
    lse = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(~sight, -torch.inf).logsumexp(-1)
    blocks = ((slice(0, 16), False), (slice(16, 32), True))
    parts = [block_gradients(grad, q, k[:, :, s], v[:, :, s], out, lse, None, causal=c) for s, c in blocks]
    torch.testing.assert_close(parts[0][0] + parts[1][0], expected[0])
    for i in (1, 2):
        torch.testing.assert_close(torch.cat([p[i] for p in parts], dim=2), expected[i])


def _ring_beside_one_rank(ranks: int, balance: bool, documents: bool) -> list[float]:
    """The largest difference of outputs and gradients, in float64, grouped heads."""
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    torch.manual_seed(5)
    length, rank = 24, dist.get_rank()
    inputs = [torch.randn(2, length, n, 8, dtype=torch.float64, requires_grad=True) for n in (4, 2, 2)]
    mask = torch.ones(length, length).tril().bool().expand(2, 1, -1, -1)
    if documents:
        document = torch.randint(0, 2, (2, length)).cumsum(1) // 4
        mask = mask & (document[:, None, :, None] == document[:, None, None, :])
    q, k, v = (x.transpose(1, 2) for x in inputs)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    grad = torch.randn_like(out)
    expected = [out, *torch.autograd.grad(out, inputs, grad)]
    mine = positions_of(rank, ranks, length, balance=balance)
    own = [x.detach()[:, mine].requires_grad_() for x in inputs]
    given = mask.int().argmax(-1)[:, 0].int() if documents else None
    found = ring_attention(
        own[0], own[1], own[2], given, rank=rank, ranks=ranks, balance=balance, group=group.group_name
    )
    pairs = zip([found, *torch.autograd.grad(found, own, grad[:, mine])], expected, strict=True)
    dist.destroy_process_group()
    return [float((a - b[:, mine]).detach().abs().max()) for a, b in pairs]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize("documents", [True, False])
def test_a_ring_sees_what_one_rank_sees(ranks: int, balance: bool, documents: bool) -> None:
    for differences in run_distributed(_ring_beside_one_rank, ranks, balance, documents, world_size=ranks):
        assert len(differences) == 4
        assert max(differences) < 1e-13
