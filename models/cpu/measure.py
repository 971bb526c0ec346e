"""How fast the CPU's own kernels are beside torch's operators, here and now, within a short time."""

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from regrow.models.cpu.attention import causal_attention
from regrow.models.cpu.choice import Case, Kind
from regrow.models.cpu.linear import HAS_ONEDNN, linear
from regrow.models.cpu.pointwise import rms_norm

__all__ = ["has_kernel", "measure", "plain_attention"]

# What one thread does in some milliseconds: multiplications of a product, of attention; elements of a norm.
_WORK = {Kind.product: 1 << 25, Kind.attention: 1 << 26, Kind.norm: 1 << 20}
_LONGEST_ATTENTION = 2048
_FEWEST, _MOST = 3, 7
_EPS = 1e-5

Function = Callable[..., Tensor]


def plain_attention(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, mask: Tensor | None = None) -> Tensor:
    """Grouped-query attention by scaled_dot_product_attention, causal without a mask."""
    out_BNTH = F.scaled_dot_product_attention(
        q_BTNH.transpose(1, 2),
        k_BTKH.transpose(1, 2),
        v_BTKH.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q_BTNH.shape[2] != k_BTKH.shape[2],
    )
    return out_BNTH.transpose(1, 2)


def has_kernel(case: Case) -> bool:
    """Whether there is anything to choose: oneDNN takes float32, and scores of long sequences leave the cache."""
    if case.kind is Kind.product:
        return HAS_ONEDNN and case.dtype is torch.float32
    return case.kind is not Kind.attention or case.sizes[1] <= _LONGEST_ATTENTION


def reduced(case: Case, threads: int) -> Case:
    """The same kind of work, of fewer rows, heads, positions or features where there is much of it."""
    sizes, most = list(case.sizes), _WORK[case.kind] * threads
    while _work(case.kind, sizes) > most:
        at = _where_to_halve(case.kind, sizes)
        if at is None:
            break
        sizes[at] //= 2
        if case.kind is Kind.attention and at == 3:
            sizes[2] //= 2
    return case._replace(sizes=tuple(sizes))


def _work(kind: Kind, sizes: Sequence[int]) -> int:
    return math.prod(sizes) if kind is not Kind.attention else sizes[0] * sizes[1] ** 2 * sizes[2] * sizes[4]


def _where_to_halve(kind: Kind, sizes: Sequence[int]) -> int | None:
    """The next size to halve; None where it could not become smaller and stay itself."""
    if kind is Kind.product:
        return max(range(3), key=lambda i: sizes[i])
    if kind is Kind.norm:
        return 0 if sizes[0] > 1 else None
    batch, length, heads, key_heads, _ = sizes
    if batch > 1:
        return 0
    if key_heads % 2 == 0:
        return 3
    if heads // key_heads % 2 == 0:
        return 2
    return 1 if length > 256 else None


def _functions(case: Case) -> tuple[Function, Function, list[Tensor]]:
    """The kernel, torch's operator, and what both are given."""
    sizes = case.sizes
    if case.kind is Kind.attention:
        batch, length, heads, key_heads, width = sizes
        shapes = [(batch, length, n, width) for n in (heads, key_heads, key_heads)]
        return causal_attention, plain_attention, [torch.randn(s).to(case.dtype) for s in shapes]
    x, *more = torch.randn(sizes[:2]).to(case.dtype), *sizes[2:]
    if case.kind is Kind.product:
        return linear, F.linear, [x, torch.randn(more[0], sizes[1])]
    weight = torch.ones(sizes[1])
    return (
        lambda x, w: rms_norm(x, w, _EPS),
        lambda x, w: F.rms_norm(x, (x.shape[-1],), w.to(x.dtype), _EPS),
        [x, weight],
    )


def _seconds(function: Function, inputs: Sequence[Tensor], grad: Tensor) -> float:
    started = time.perf_counter()
    torch.autograd.grad(function(*inputs), inputs, grad)
    return time.perf_counter() - started


@torch.enable_grad()
def _ratio(case: Case, deadline: float) -> float | None:
    own, plain, inputs = _functions(reduced(case, torch.get_num_threads()))
    inputs = [x.requires_grad_() for x in inputs]
    grad = torch.randn_like(plain(*inputs))
    ratios: list[float] = []
    for number in range(_MOST + 1):
        started = time.perf_counter()
        pair = [_seconds(f, inputs, grad) for f in (plain, own)]
        if number > 0:  # The first brings code and memory in.
            ratios.append(pair[0] / pair[1])
        ended = time.perf_counter()
        if ended + (ended - started) > deadline:
            break
    return statistics.median(ratios) if len(ratios) >= _FEWEST else None


def measure(cases: Sequence[Case], within_s: float) -> dict[str, float]:
    """The operator's time through the kernel's, forward and backward, by the case's name: medians of pairs.

    Random numbers are those of a generator that is put back as it was.

    Args:
        cases: for which there is a kernel.
        within_s: seconds for all together; cases whose share is too short for three pairs are left out.
    """
    found: dict[str, float] = {}
    deadline = time.perf_counter() + within_s
    with torch.random.fork_rng(devices=[]):
        for number, case in enumerate(cases):
            now = time.perf_counter()
            ratio = _ratio(case, now + (deadline - now) / (len(cases) - number)) if now < deadline else None
            if ratio is not None:
                found[str(case)] = ratio
    return found
