"""Every form in which kernels take documents and windows says the same as a mask, in float64.

On a CPU FlexAttention has no backward pass, so that its mask goes through the dense path for gradients, and segments
have no kernel, so that a loop over them stands in; the kernels themselves are in tests/gpu.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

from regrow.models.attention import Sight, attend, choose_kernel, dense_mask, first_seen
from regrow.models.attention_kernels import Blocks, Segments, make_blocks, segments_of, segments_of_chunk
from regrow.models.config import AttentionKernel
from regrow.models.cpu import plain_attention
from regrow.models.documents import Documents, describe_documents
from regrow.trainer.parallel.attention import prepare_documents
from tests.attention import by_segments, plain_mask

WINDOWS = [0, 1, 7, 130, 1000]


def described(rows: int, length: int, seed: int, often: float = 0.02) -> tuple[Tensor, Documents]:
    """Numbers of documents, and their description."""
    numbers = (torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)) < often).long().cumsum(1)
    return numbers, describe_documents(numbers)


def inputs(rows: int, length: int, heads: tuple[int, int], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries, keys and values."""
    torch.manual_seed(1)
    return [torch.randn(rows, length, n, 16, dtype=dtype, requires_grad=True) for n in (*heads, heads[1])]


def results(sight: Sight, given_: list[Tensor], window: int, grad: Tensor) -> list[Tensor]:
    out = sight.attend(given_[0], given_[1], given_[2], window)
    return [out.detach(), *torch.autograd.grad(out, given_, grad)]


@given(st.integers(1, 3), st.integers(1, 300), st.sampled_from(WINDOWS), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_what_is_seen_first_says_the_same_as_a_mask(rows: int, length: int, window: int, seed: int) -> None:
    numbers, documents = described(rows, length, seed)
    last = torch.arange(length, dtype=torch.int32)
    found = dense_mask(first_seen(documents.starts, window), last, length).allowed
    assert torch.equal(found, plain_mask(numbers, window))


@given(
    st.integers(1, 2), st.integers(1, 400), st.sampled_from(WINDOWS), st.integers(0, 1000), st.floats(0, 1), st.data()
)
@settings(max_examples=40, deadline=None)
def test_blocks_say_the_same_as_a_mask(
    rows: int, length: int, window: int, seed: int, often: float, data: st.DataObject
) -> None:
    """For all queries, and for those from some position on, with the keys up to another."""
    numbers, documents = described(rows, length, seed, often)
    stop = data.draw(st.integers(1, length))
    start = data.draw(st.integers(0, stop - 1))
    last = torch.arange(start, stop, dtype=torch.int32)
    mask = make_blocks(first_seen(documents.starts, window)[:, start:stop], last, stop).mask
    expected = plain_mask(numbers, window)[:, :, start:stop, :stop]
    assert torch.equal(create_mask(mask.mask_mod, rows, 1, stop - start, stop, "cpu"), expected)
    partial, whole = (
        blocks_of(mask.kv_num_blocks, mask.kv_indices),
        blocks_of(mask.full_kv_num_blocks, mask.full_kv_indices),
    )
    assert not (partial & whole).any()
    size = 128
    for row in range(rows):
        for q in range(-(-(stop - start) // size)):
            for k in range(-(-stop // size)):
                block = expected[row, 0, q * size : (q + 1) * size, k * size : (k + 1) * size]
                assert not whole[row, 0, q, k] or (bool(block.all()) and block.shape == (size, size))
                assert bool(partial[row, 0, q, k] | whole[row, 0, q, k]) or not block.any()


def blocks_of(numbers: Tensor | None, indices: Tensor | None) -> Tensor:
    """Which blocks are listed, bool."""
    assert numbers is not None
    assert indices is not None
    listed = torch.arange(indices.shape[-1]) < numbers[..., None]
    return torch.zeros(indices.shape, dtype=torch.bool).scatter(-1, indices.long(), listed)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("window", [0, 7, 130])
def test_blocks_attend_like_a_mask(heads: tuple[int, int], window: int) -> None:
    numbers, documents = described(2, 200, seed=3)
    blocks = prepare_documents(documents, [window], AttentionKernel.flex, None).prepared[window]
    assert isinstance(blocks, Blocks)
    q, k, v = (x.detach() for x in inputs(2, 200, heads))
    found = blocks.attend(q, k, v, window)
    torch.testing.assert_close(found, plain_attention(q, k, v, plain_mask(numbers, window)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("window", WINDOWS)
def test_segments_attend_like_a_mask(heads: tuple[int, int], window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients, of whole sequences and of each chunk with the keys before its end."""
    monkeypatch.setattr("regrow.models.attention_kernels.varlen_attention", by_segments)
    numbers, documents = described(2, 48, seed=5, often=0.1)
    q, k, v = inputs(2, 48, heads)
    grad = torch.randn_like(q)
    for start, stop in ((0, 48), (0, 12), (12, 24), (36, 48)):
        segments = segments_of(documents) if stop - start == 48 else segments_of_chunk(documents, start, stop)
        assert int(segments.queries[-1]) == 2 * (stop - start)
        assert int(segments.keys[-1]) == 2 * stop
        given_ = [q[:, start:stop], k[:, :stop], v[:, :stop]]
        mask = plain_mask(numbers, window)[:, :, start:stop, :stop]
        out = plain_attention(given_[0], given_[1], given_[2], mask)
        expected = [out.detach(), *torch.autograd.grad(out, given_, grad[:, start:stop])]
        for a, b in zip(results(segments, given_, window, grad[:, start:stop]), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kernel", [AttentionKernel.varlen, AttentionKernel.flex])
def test_the_path_of_a_gpu_has_its_shapes_on_the_meta_device(kernel: AttentionKernel, dtype: torch.dtype) -> None:
    """And makes nothing of the size of seq × seq."""
    length = 8192
    documents = describe_documents(torch.zeros(2, length, dtype=torch.long))
    seen = _Largest()
    with seen:
        prepared = prepare_documents(documents.to(torch.device("meta")), [0, 512], kernel, None)
        for window in (0, 512):
            q, k, v = (torch.empty(2, length, n, 64, dtype=dtype, device="meta").requires_grad_() for n in (8, 2, 2))
            out = attend(q, k, v, prepared, window)
            assert out.shape == q.shape
            grads = torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
            assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]
    assert seen.elements < length * length / 4


class _Largest(torch.overrides.TorchFunctionMode):
    """The largest tensor that any function gave."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_a_window_without_documents_is_a_band() -> None:
    q, k, v = inputs(1, 20, (4, 2))
    for window in (1, 5, 20, 30):
        expected = plain_attention(q, k, v, plain_mask(torch.zeros(1, 20), window))
        torch.testing.assert_close(attend(q, k, v, None, window), expected)


def test_auto_takes_what_the_device_and_the_numbers_allow() -> None:
    auto, bf16 = AttentionKernel.auto, torch.bfloat16
    assert choose_kernel(auto, bf16, 128, accelerator=False) is AttentionKernel.sdpa
    assert choose_kernel(auto, bf16, 128, accelerator=True) is AttentionKernel.varlen
    assert choose_kernel(auto, bf16, 512, accelerator=True) is AttentionKernel.flex
    assert choose_kernel(auto, torch.float32, 128, accelerator=True) is AttentionKernel.flex
    assert choose_kernel(auto, torch.float64, 128, accelerator=True) is AttentionKernel.sdpa
    assert choose_kernel(AttentionKernel.flex, bf16, 128, accelerator=True) is AttentionKernel.flex


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["sdpa", "flex", "varlen"])
def test_a_compiled_layer_takes_them_in_one_graph(kernel: str) -> None:
    """With segments of two lengths it is compiled twice at most."""
    compiled = 0

    def count(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Any:
        nonlocal compiled
        compiled += 1
        return graph.forward

    torch._dynamo.reset()
    layer = torch.compile(attend, backend=count, fullgraph=True)
    device = torch.device("meta" if kernel == "varlen" else "cpu")
    for often in (0.01, 0.02, 0.3, 0.5, 0.9):
        _, documents = described(2, 1024, seed=2, often=often)
        prepared = prepare_documents(documents.to(device), [0, 16], AttentionKernel(kernel), None)
        q, k, v = (x.detach().to(device) for x in inputs(2, 1024, (4, 2), torch.float32))
        assert layer(q, k, v, prepared, 16).shape == q.shape
    torch._dynamo.reset()
    assert compiled <= 2


def test_segments_hold_every_key_once() -> None:
    segments = Segments(*segments_of_chunk(described(3, 64, seed=1)[1], 32, 48))
    assert int(segments.keys[0]) == int(segments.queries[0]) == 0
    assert bool((segments.keys.diff() >= 0).all())
    assert bool((segments.queries.diff() >= 0).all())
    assert bool((segments.queries.diff() <= segments.keys.diff()).all())
