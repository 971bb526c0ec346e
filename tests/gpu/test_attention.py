"""Attention within documents and windows by an accelerator's kernels, beside a mask in float32 on the CPU."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from regrow.models.attention import attend
from regrow.models.attention_kernels import segments_of_chunk
from regrow.models.config import AttentionKernel
from regrow.models.cpu import plain_attention
from regrow.models.documents import Documents, describe_documents
from regrow.trainer.parallel.attention import prepare_documents
from tests.attention import plain_mask
from tests.support import metrics, regrow, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator"),
]

DEVICE = torch.device("cuda", 0)
# Of outputs and gradients, absolute and relative.
LIMITS = {torch.bfloat16: 3e-2, torch.float32: 2e-3}


def case(
    length: int, heads: tuple[int, int], dtype: torch.dtype, often: float
) -> tuple[Tensor, Documents, list[Tensor], Tensor]:
    """Numbers of documents, their description on the device, rounded inputs in float32 on the CPU, and a gradient."""
    torch.manual_seed(11)
    numbers = (torch.rand(2, length) < often).long().cumsum(1)
    inputs = [
        torch.randn(2, length, n, 64).to(dtype).float().requires_grad_() for n in (heads[0], heads[1], heads[1])
    ]
    grad = torch.randn(2, length, heads[0], 64).to(dtype).float()
    return numbers, describe_documents(numbers).pin_memory().to(DEVICE), inputs, grad


def on_device(inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [x.detach().to(DEVICE, dtype).requires_grad_() for x in inputs]


def assert_near(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.device.type == "cuda"
        torch.testing.assert_close(a.detach().float().cpu(), b.detach(), rtol=LIMITS[dtype], atol=LIMITS[dtype])


KERNELS = [
    (AttentionKernel.varlen, torch.bfloat16),
    (AttentionKernel.flex, torch.bfloat16),
    (AttentionKernel.flex, torch.float32),
    (AttentionKernel.sdpa, torch.bfloat16),
    (AttentionKernel.sdpa, torch.float32),
]


@pytest.mark.parametrize(("kernel", "dtype"), KERNELS, ids=lambda x: str(getattr(x, "name", x)))
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
@pytest.mark.parametrize(("window", "often"), [(0, 0.01), (100, 0.01), (100, 0.0), (0, 0.3)])
def test_kernels_see_what_a_mask_shows(
    kernel: AttentionKernel, dtype: torch.dtype, heads: tuple[int, int], window: int, often: float
) -> None:
    """Outputs and gradients; a length that no block divides, and many short documents."""
    numbers, documents, inputs, grad = case(400, heads, dtype, often)
    out = plain_attention(inputs[0], inputs[1], inputs[2], plain_mask(numbers, window))
    expected = [out, *torch.autograd.grad(out, inputs, grad)]
    near = on_device(inputs, dtype)
    prepared = prepare_documents(documents, [window], kernel, None)
    found = attend(near[0], near[1], near[2], prepared, window)
    assert_near([found, *torch.autograd.grad(found, near, grad.to(DEVICE, dtype))], expected, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_causal_attention_is_that_of_the_cpu(dtype: torch.dtype) -> None:
    _, _, inputs, grad = case(256, (8, 2), dtype, 0.0)
    out = plain_attention(inputs[0], inputs[1], inputs[2])
    expected = [out, *torch.autograd.grad(out, inputs, grad)]
    near = on_device(inputs, dtype)
    found = attend(near[0], near[1], near[2], None)
    assert_near([found, *torch.autograd.grad(found, near, grad.to(DEVICE, dtype))], expected, dtype)


def test_keys_that_no_query_of_a_chunk_sees_have_no_gradient() -> None:
    """What a rank with a part of the sequence does: segments without queries, and segments without keys."""
    numbers, documents, inputs, grad = case(384, (8, 2), torch.bfloat16, 0.02)
    for start, stop in ((0, 96), (96, 192), (288, 384)):
        given = [inputs[0][:, start:stop], inputs[1][:, :stop], inputs[2][:, :stop]]
        mask = plain_mask(numbers, 0)[:, :, start:stop, :stop]
        out = plain_attention(given[0], given[1], given[2], mask)
        expected = [out, *torch.autograd.grad(out, given, grad[:, start:stop])]
        near = on_device(given, torch.bfloat16)
        found = segments_of_chunk(documents, start, stop).attend(near[0], near[1], near[2], 0)
        grads = torch.autograd.grad(found, near, grad[:, start:stop].to(DEVICE, torch.bfloat16))
        assert_near([found, *grads], expected, torch.bfloat16)


@pytest.mark.parametrize(("kernel", "dtype"), [KERNELS[0], KERNELS[2]], ids=["varlen", "flex"])
def test_a_compiled_block_takes_documents_in_one_graph(kernel: AttentionKernel, dtype: torch.dtype) -> None:
    compiled = torch.compile(attend, fullgraph=True)
    for often in (0.01, 0.02, 0.1):
        numbers, documents, inputs, grad = case(512, (8, 2), dtype, often)
        out = plain_attention(inputs[0], inputs[1], inputs[2], plain_mask(numbers, 0))
        expected = [out, *torch.autograd.grad(out, inputs, grad)]
        near = on_device(inputs, dtype)
        found = compiled(near[0], near[1], near[2], prepare_documents(documents, [0], kernel, None), 0)
        assert_near([found, *torch.autograd.grad(found, near, grad.to(DEVICE, dtype))], expected, dtype)


@pytest.mark.parametrize("kernel", [AttentionKernel.varlen, AttentionKernel.flex])
def test_documents_of_a_long_window_take_no_square_of_it(kernel: AttentionKernel) -> None:
    """Forward and backward at 16,384 tokens; a mask alone would be 256 MiB, and is nowhere made."""
    _, documents, _, _ = case(16_384, (4, 2), torch.bfloat16, 0.002)
    near = [torch.randn(2, 16_384, n, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for n in (4, 2, 2)]
    held = torch.cuda.memory_allocated()
    # What compiling it needs does not count.
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        found = attend(near[0], near[1], near[2], prepare_documents(documents, [0], kernel, None))
        torch.autograd.grad(found, near, torch.ones_like(found))
    assert torch.cuda.max_memory_allocated() - held < 200 << 20


def test_documents_are_described_to_the_device_without_waiting() -> None:
    numbers = (torch.rand(2, 1024) < 0.01).long().cumsum(1)
    documents = describe_documents(numbers).pin_memory()
    for kernel in (AttentionKernel.varlen, AttentionKernel.flex):
        try:
            torch.cuda.set_sync_debug_mode("error")
            prepare_documents(documents.to(DEVICE), [0, 64], kernel, None)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_with_documents_and_a_window_trains_like_the_cpu(corpus: Path, tmp_path: Path, precision: str) -> None:
    arguments = tiny(
        corpus, "train.steps=5", "hooks=none", "data.global_batch_size=8", "data.document_mask=true",
        "model.window=20", "model.dim=64", f"precision={precision}",
    )  # fmt: skip
    for device in ("cpu", "cuda"):
        code, out = regrow([*arguments, f"launch.device={device}", f"run.name={device}"], tmp_path)
        assert code == 0, out
    for cpu, cuda in zip(metrics(tmp_path / "outputs/cpu"), metrics(tmp_path / "outputs/cuda"), strict=True):
        assert cuda["loss"] == pytest.approx(cpu["loss"], rel=1e-4 if precision == "fp32" else 1e-2)
