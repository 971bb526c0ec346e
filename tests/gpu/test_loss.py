"""The loss that never holds the logits, by the products of the device."""

import pytest
import torch
from torch import Tensor, nn

from regrow.models.linear import Linear
from regrow.trainer.loss import summed_cross_entropy
from regrow.trainer.loss_kernels import LossKernels, compiled_kernels
from regrow.trainer.parallel.output_loss import ChunkedLoss, chunk_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator"),
]

DEVICE = torch.device("cuda", 0)
ROWS, DIM, VOCABULARY = 16_384, 512, 32_001


def made(dtype: torch.dtype, weight_dtype: torch.dtype) -> tuple[Tensor, Linear, Tensor]:
    """Hidden states, an output layer and labels, of which some do not count."""
    torch.manual_seed(0)
    output = Linear(DIM, VOCABULARY).to(DEVICE, weight_dtype)
    nn.init.normal_(output.weight, std=DIM**-0.5)
    labels = torch.randint(0, VOCABULARY, (4, ROWS // 4), device=DEVICE)
    labels[0, ::3] = -100
    return torch.randn(4, ROWS // 4, DIM, device=DEVICE, dtype=dtype, requires_grad=True), output, labels


def results(loss: Tensor, hidden: Tensor, output: Linear) -> list[Tensor]:
    (loss / ROWS).backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    assert output.weight.grad is not None
    found = [loss.detach().clone(), hidden.grad.double(), output.weight.grad.double()]
    hidden.grad = output.weight.grad = None
    return found


@pytest.fixture(params=["operators", "kernels"])
def kernels(request: pytest.FixtureRequest) -> LossKernels | None:
    return compiled_kernels("inductor") if request.param == "kernels" else None


@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "limit"),
    [
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 1e-2),
        (torch.bfloat16, torch.bfloat16, 1e-2),
    ],
    ids=["fp32", "bf16 with fp32 masters", "bf16"],
)
@pytest.mark.parametrize("rows", [ROWS, 4096, 1000])
def test_it_is_the_plain_loss_on_the_device(
    kernels: LossKernels | None, dtype: torch.dtype, weight_dtype: torch.dtype, limit: float, rows: int
) -> None:
    hidden, output, labels = made(dtype, weight_dtype)
    expected = results(summed_cross_entropy(output(hidden), labels), hidden, output)
    found = results(ChunkedLoss(labels, rows=rows, kernels=kernels)(hidden, output), hidden, output)
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).norm() / b.norm()) < limit
    exact = [t.detach().double().requires_grad_() for t in (hidden, output.weight)]
    wide = Linear(DIM, VOCABULARY).to(DEVICE, torch.float64)
    wide.weight = nn.Parameter(exact[1].detach())
    true = results(ChunkedLoss(labels, rows=2048)(exact[0], wide), exact[0], wide)
    for a, b in zip(found, true, strict=True):
        assert float((a - b).norm() / b.norm()) < limit


def test_it_repeats_bitwise(kernels: LossKernels | None) -> None:
    hidden, output, labels = made(torch.bfloat16, torch.float32)
    loss = ChunkedLoss(labels, kernels=kernels)
    first, again = (results(loss(hidden, output), hidden, output) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_never_holds_the_logits_on_the_device(kernels: LossKernels | None, dtype: torch.dtype) -> None:
    """Beside the gradients a chunk, a block of it in float32, and a copy of the weight where the dtypes differ."""
    hidden, output, labels = made(dtype, torch.float32)
    peaks = []
    for chunked in (True, False):
        results(ChunkedLoss(labels, kernels=kernels)(hidden, output), hidden, output)
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        chunks = ChunkedLoss(labels, kernels=kernels)
        loss = chunks(hidden, output) if chunked else summed_cross_entropy(output(hidden), labels)
        (loss / ROWS).backward()  # type: ignore[no-untyped-call]
        hidden.grad = output.weight.grad = None
        del loss
        peaks.append(torch.cuda.max_memory_allocated() - held)
    chunk = chunk_rows(ROWS, VOCABULARY, "cuda") * VOCABULARY
    weight = output.weight.numel()
    copy = weight * dtype.itemsize if dtype is torch.bfloat16 else 0
    block = 4 * (1 << 26) if kernels is None else 0
    bound = chunk * dtype.itemsize + block + 4 * weight + hidden.numel() * dtype.itemsize + copy
    # Numbers a row, and cuBLAS' workspace.
    assert peaks[0] <= bound + (64 << 20)
    assert peaks[0] * 2 < peaks[1]


def test_it_never_waits_for_the_device(kernels: LossKernels | None) -> None:
    hidden, output, labels = made(torch.bfloat16, torch.float32)
    loss = ChunkedLoss(labels, kernels=kernels)
    results(loss(hidden, output), hidden, output)
    with torch.no_grad():
        loss(hidden, output)
    try:
        torch.cuda.set_sync_debug_mode("error")
        (loss(hidden, output) / ROWS).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            loss(hidden, output)
    finally:
        torch.cuda.set_sync_debug_mode("default")
