"""Causal attention on a CPU, by products of blocks.

On some CPUs (Zen 5) torch's flash kernel reaches a tenth of the machine's rate in bfloat16 and a third in float32,
because its products are small; on others (Zen 3, Sapphire Rapids) it is faster than this. Here a block of queries
meets all keys before it in one batched product, and the query heads that share a key head are one matrix, so that
nothing is repeated. As in flash attention (Dao 2023, arXiv:2307.08691), the backward pass computes the weights again:
nothing of size T² is kept. Scores, their softmax and its derivative are float32 or better; the other products have
the inputs' dtype, their sums over blocks float32 or better.

Shapes: B batch, T positions, N query heads, K key/value heads, G = N / K, H head width, C queries of a block,
Q = C · G, S keys that they see; M = B · K.
"""

from typing import Any

import torch
from torch import Tensor

from regrow.torch_compat import softmax_gradient

__all__ = ["causal_attention"]

# Scores of a block of queries stay in the cache.
_BLOCK = 128


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + _BLOCK, length)) for start in range(0, length, _BLOCK)]


def _by_key_head(x_BTNH: Tensor, groups: int) -> Tensor:
    """`(M, C · G, H)`, contiguous: the queries that share a key head are one matrix."""
    b, c, n, h = x_BTNH.shape
    return x_BTNH.view(b, c, n // groups, groups, h).transpose(1, 2).reshape(b * n // groups, c * groups, h)


def _by_position(x_MQH: Tensor, batch: int, groups: int) -> Tensor:
    """The inverse of `_by_key_head`, as a view: `(B, C, K, G, H)`."""
    m, q, h = x_MQH.shape
    return x_MQH.view(batch, m // batch, q // groups, groups, h).transpose(1, 2)


def _weights(q_MQH: Tensor, k_MSH: Tensor, rows: int, groups: int) -> Tensor:
    """The softmax of the scores of the last `rows` of S positions, in the inputs' dtype."""
    scores_MQS = torch.bmm(q_MQH, k_MSH.transpose(1, 2))
    future_CC = torch.full((rows, rows), -torch.inf, dtype=scores_MQS.dtype).triu_(1)
    scores_MQS[:, :, -rows:] += future_CC.repeat_interleave(groups, 0)
    return torch.softmax(scores_MQS, -1)


@torch.library.custom_op("regrow::causal_attention", mutates_args=(), device_types="cpu")
def _forward(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
    """The output, `(B, T, N, H)`."""
    b, t, n, h = q_BTNH.shape
    groups, dtype = n // k_BTKH.shape[2], q_BTNH.dtype
    exact = torch.promote_types(dtype, torch.float32)
    k_MTH, v_MTH = _by_key_head(k_BTKH, 1).to(exact).mul(h**-0.5), _by_key_head(v_BTKH, 1)
    out_BTNH = torch.empty((b, t, n, h), dtype=dtype)
    for start, stop in _blocks(t):
        q_MQH = _by_key_head(q_BTNH[:, start:stop], groups).to(exact)
        weights_MQS = _weights(q_MQH, k_MTH[:, :stop], stop - start, groups).to(dtype)
        out_MQH = torch.bmm(weights_MQS, v_MTH[:, :stop])
        out_BTNH.view(b, t, -1, groups, h)[:, start:stop] = _by_position(out_MQH, b, groups)
    return out_BTNH


@torch.library.custom_op("regrow::causal_attention_backward", mutates_args=(), device_types="cpu")
def _backward(grad_BTNH: Tensor, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values."""
    b, t, n, h = q_BTNH.shape
    groups, scale, dtype = n // k_BTKH.shape[2], h**-0.5, q_BTNH.dtype
    exact = torch.promote_types(dtype, torch.float32)
    k_MTH, v_MTH = _by_key_head(k_BTKH, 1), _by_key_head(v_BTKH, 1)
    exact_k_MTH = k_MTH.to(exact).mul(scale)
    grad_q_BTNH = torch.empty((b, t, n, h), dtype=dtype)
    grad_k_MTH, grad_v_MTH = torch.zeros(k_MTH.shape, dtype=exact), torch.zeros(v_MTH.shape, dtype=exact)
    for start, stop in _blocks(t):
        rows, seen = slice(start, stop), slice(0, stop)
        q_MQH, grad_MQH = _by_key_head(q_BTNH[:, rows], groups), _by_key_head(grad_BTNH[:, rows], groups)
        weights_MQS = _weights(q_MQH.to(exact), exact_k_MTH[:, seen], stop - start, groups)
        grad_v_MTH[:, seen] += torch.bmm(weights_MQS.to(dtype).transpose(1, 2), grad_MQH)
        grad_w_MQS = torch.bmm(grad_MQH, v_MTH[:, seen].transpose(1, 2)).to(exact)
        grad_s_MQS = softmax_gradient(grad_w_MQS, weights_MQS, -1, exact).to(dtype)
        grad_q_MQH = torch.bmm(grad_s_MQS, k_MTH[:, seen]).mul_(scale)
        grad_q_BTNH.view(b, t, -1, groups, h)[:, rows] = _by_position(grad_q_MQH, b, groups)
        grad_k_MTH[:, seen] += torch.bmm(grad_s_MQS.transpose(1, 2), q_MQH)
    grad_k_MTH *= scale
    grad_k_BTKH, grad_v_BTKH = (
        _by_position(g, b, 1).to(dtype).reshape(k_BTKH.shape) for g in (grad_k_MTH, grad_v_MTH)
    )
    return grad_q_BTNH, grad_k_BTKH, grad_v_BTKH


@_forward.register_fake
def _(q_BTNH: Tensor, *_key_and_value: Tensor) -> Tensor:
    return torch.empty_like(q_BTNH, memory_format=torch.contiguous_format)


@_backward.register_fake
def _(_grad_BTNH: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad_BTNH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grads: tuple[Tensor, Tensor, Tensor] = _backward(grad_BTNH, *ctx.saved_tensors)
    return grads


_forward.register_autograd(_differentiate, setup_context=_keep)


def causal_attention(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
    """Attention of each position to itself and those before; K divides N.

    Args:
        q_BTNH: `(B, T, N, H)`, on a CPU, as all.
        k_BTKH: `(B, T, K, H)`.
        v_BTKH: `(B, T, K, H)`.

    Returns:
        `(B, T, N, H)`, contiguous.
    """
    out_BTNH: Tensor = _forward(q_BTNH, k_BTKH, v_BTKH)
    return out_BTNH
