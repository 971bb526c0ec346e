"""The loss that never holds the logits, beside the one that does: results, gradients, ranks and memory."""

import functools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from regrow.models.cpu import Case, Kind, has_kernel, use
from regrow.models.layers import Decoder
from regrow.models.linear import Linear
from regrow.models.llama3.config import Llama3Config
from regrow.models.llama3.model import Llama3
from regrow.trainer.loss import summed_cross_entropy
from regrow.trainer.loss_kernels import LossKernels, compiled_kernels, row_gradient, row_statistics
from regrow.trainer.parallel.context import close_parallel, open_parallel
from regrow.trainer.parallel.layout import Layout
from regrow.trainer.parallel.output_loss import ChunkedLoss, TrainingLoss, chunk_rows
from regrow.trainer.parallel.vocabulary import VocabularyShard
from tests.engines import WithLogits, llama_config, peak_of
from tests.pool import run_distributed

# What a GPU's are compiled from.
KERNELS = LossKernels(row_statistics, row_gradient)
# Loss, gradients of the hidden states and of the weight.
Results = tuple[Tensor, Tensor, Tensor]


def made(rows: int, dim: int, vocabulary: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Linear, Tensor]:
    """Hidden states, an output layer and labels, of which some do not count."""
    torch.manual_seed(0)
    output = Linear(dim, vocabulary).to(dtype)
    nn.init.normal_(output.weight)
    labels = torch.randint(0, vocabulary, (1, rows))
    labels[0, ::3] = -100
    return torch.randn(1, rows, dim, dtype=dtype, requires_grad=True), output, labels


def results(loss: Callable[[Tensor, nn.Linear], Tensor], hidden: Tensor, output: nn.Linear) -> Results:
    """Of a mean over seven tokens."""
    for tensor in (hidden, output.weight):
        tensor.grad = None
    total = loss(hidden, output)
    (total / 7).backward()  # type: ignore[no-untyped-call]
    assert output.weight.grad is not None
    assert hidden.grad is not None
    return total.detach(), hidden.grad, output.weight.grad


def plain(labels: Tensor, z_loss: float = 0.0) -> Callable[[Tensor, nn.Linear], Tensor]:
    """From the logits, by torch's operators and autograd."""

    def loss(hidden: Tensor, output: nn.Linear) -> Tensor:
        logits: Tensor = output(hidden).flatten(0, 1)
        total = F.cross_entropy(logits, labels.flatten(), reduction="sum", ignore_index=-100)
        squares = (logits.logsumexp(-1) ** 2).masked_fill(labels.flatten() == -100, 0.0).sum()
        more = z_loss * squares
        # The loss that is told is without it.
        return total + more - more.detach()

    return loss


def from_logits(
    labels: Tensor,
    shard: VocabularyShard | None,
    z_loss: float,
    kernels: LossKernels | None,
    hidden: Tensor,
    output: nn.Module,
) -> Tensor:
    """The loss for models that are asked for their logits."""
    return summed_cross_entropy(output(hidden), labels, shard=shard, z_loss=z_loss, kernels=kernels)


def apart(found: Results, expected: Results) -> float:
    """The largest difference, relative to the norm."""
    pairs = zip(found, expected, strict=True)
    return max(float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-9)) for a, b in pairs)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 40),
    vocabulary=st.integers(1, 50),
    chunk=st.integers(1, 41),
    z_loss=st.sampled_from((0.0, 0.1)),
    kernels=st.sampled_from((None, KERNELS)),
)
def test_it_is_the_plain_loss_whatever_the_sizes(
    rows: int, vocabulary: int, chunk: int, z_loss: float, kernels: LossKernels | None
) -> None:
    hidden, output, labels = made(rows, 8, vocabulary)
    chunked = results(ChunkedLoss(labels, rows=chunk, z_loss=z_loss, kernels=kernels), hidden, output)
    assert apart(chunked, results(plain(labels, z_loss), hidden, output)) < 1e-13
    given_logits = results(functools.partial(from_logits, labels, None, z_loss, kernels), hidden, output)
    assert apart(given_logits, results(plain(labels, z_loss), hidden, output)) < 1e-13


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
def test_compiled_kernels_agree_with_the_operators(dtype: torch.dtype, limit: float) -> None:
    """With a last chunk that is shorter, and without gradients; logits are overwritten by their gradient, or not."""
    hidden, output, labels = made(300, 64, 321, torch.float32)
    hidden = hidden.detach().to(dtype).requires_grad_()
    kernels = compiled_kernels("aot_eager")
    for z_loss in (0.0, 0.1):
        expected = results(ChunkedLoss(labels, rows=128, z_loss=z_loss), hidden, output)
        chunked = ChunkedLoss(labels, rows=128, z_loss=z_loss, kernels=kernels)
        assert apart(results(chunked, hidden, output), expected) < limit
        given_logits = functools.partial(from_logits, labels, None, z_loss, kernels)
        assert apart(results(given_logits, hidden, output), expected) < limit
        with torch.no_grad():
            assert float(chunked(hidden, output)) == pytest.approx(float(expected[0]), rel=1e-6)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
def test_chunks_change_the_weights_gradient_alone_and_by_rounding(dtype: torch.dtype, limit: float) -> None:
    hidden, output, labels = made(300, 64, 321, torch.float32)
    hidden = hidden.detach().to(dtype).requires_grad_()
    whole = results(ChunkedLoss(labels, rows=300), hidden, output)
    assert whole[2].dtype == torch.float32
    assert apart(whole, results(plain(labels), hidden, output)) < limit
    for rows in (16, 64, 100):
        parts = results(ChunkedLoss(labels, rows=rows), hidden, output)
        assert torch.equal(parts[0], whole[0])
        assert torch.equal(parts[1], whole[1])
        assert apart(parts, whole) < limit


def test_no_label_that_counts() -> None:
    hidden, output, labels = made(5, 4, 6)
    total, grad_hidden, grad_weight = results(ChunkedLoss(torch.full_like(labels, -100), z_loss=1.0), hidden, output)
    assert float(total) == 0.0
    assert not grad_hidden.any()
    assert not grad_weight.any()


def test_it_multiplies_as_the_layer_does() -> None:
    """With the kernel that was chosen for the layer's shape."""
    hidden, output, labels = made(64, 32, 50, torch.float32)
    case = Case(Kind.product, torch.float32, (64, 32, 50))
    assert has_kernel(case)
    expected = results(ChunkedLoss(labels, rows=20), hidden, output)
    use([case])
    try:
        found = results(ChunkedLoss(labels, rows=20), hidden, output)
    finally:
        use([])
    assert apart(found, expected) < 1e-6
    assert found[2].shape == output.weight.shape


def test_without_gradients_there_are_none() -> None:
    hidden, output, labels = made(9, 4, 6)
    with torch.no_grad():
        total = ChunkedLoss(labels, rows=2)(hidden, output)
    assert not total.requires_grad
    frozen = made(9, 4, 6)[1].requires_grad_(requires_grad=False)
    assert not ChunkedLoss(labels)(hidden.detach(), frozen).requires_grad
    half = ChunkedLoss(labels)(hidden, frozen)
    half.backward()  # type: ignore[no-untyped-call]
    assert frozen.weight.grad is None
    assert float(half.detach()) == pytest.approx(float(total), rel=1e-12)


def test_a_second_backward_pass_is_refused_unless_it_runs_in_halves() -> None:
    hidden, output, labels = made(9, 4, 6)
    loss = ChunkedLoss(labels)(hidden, output)
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()  # type: ignore[no-untyped-call]
    expected = results(plain(labels), hidden, output)
    halves = ChunkedLoss(labels, splits_backward=True)(hidden, output) / 7
    (grad_hidden,) = torch.autograd.grad(halves, [hidden], retain_graph=True)
    (grad_weight,) = torch.autograd.grad(halves, [output.weight])
    assert apart((halves.detach() * 7, grad_hidden, grad_weight), expected) < 1e-13


class Squashed(nn.Linear):
    """An output layer of somebody's own."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x))


def test_output_layers_that_do_more_are_asked_for_their_logits() -> None:
    hidden, output, labels = made(9, 4, 6)
    own = Squashed(4, 6, bias=True).double()
    assert apart(results(ChunkedLoss(labels), hidden, own), results(plain(labels), hidden, own)) < 1e-13
    seen: list[torch.Size] = []
    handle = output.register_forward_hook(lambda _module, _given, out: seen.append(out.shape))
    assert apart(results(ChunkedLoss(labels), hidden, output), results(plain(labels), hidden, output)) < 1e-13
    assert seen == [torch.Size([1, 9, 6])] * 2
    handle.remove()
    results(ChunkedLoss(labels), hidden, output)
    assert len(seen) == 2


class OwnForward(WithLogits):
    """A decoder that does more with its logits, written before the loss could be had without them."""

    def forward(  # type: ignore[override]
        self, tokens: Tensor, mask: Any = None, positions: Any = None, valid: Any = None
    ) -> Tensor:
        return 2 * super().forward(tokens, mask, positions, valid)


def gradients(kind: type[Decoder], config: Llama3Config) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = kind(config).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.init_buffers(torch.device("cpu"), 8)
    tokens, labels = torch.randint(0, 53, (2, 2, 8))
    labels[0, 2] = -100
    loss = TrainingLoss(model, shard=None, z_loss=0.0, splits_backward=False)
    total = loss.of(model(tokens, **loss.options(labels)), labels)
    (total / 15).backward()  # type: ignore[no-untyped-call]
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100)
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-13)
    (expected / 15).backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert float((parameter.grad - found[name]).norm() / parameter.grad.norm()) < 1e-12, name
    return total, found


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_gives_every_parameter_the_same_gradient(tied: bool) -> None:
    gradients(Llama3, llama_config(tied_embeddings=tied))


def test_a_model_with_a_forward_pass_of_its_own_is_asked_for_its_logits() -> None:
    total, _ = gradients(OwnForward, llama_config())
    assert float(total.detach()) != pytest.approx(float(gradients(Llama3, llama_config())[0].detach()))


def shared(vocabularies: list[int]) -> list[tuple[float, ...]]:
    """On ranks that share the vocabulary: the differences of every variant from the whole."""
    world = int(os.environ["WORLD_SIZE"])
    context = open_parallel(Layout(dp_replicate=1, dp_shard=1, tp=world, pp=1, cp=1, ep=1), "cpu", 30.0)
    group = context.group_name("tp")
    found: list[tuple[float, ...]] = []
    for vocabulary in vocabularies:
        for dtype, z_loss in ((torch.float64, 0.0), (torch.float64, 0.1), (torch.bfloat16, 0.0)):
            hidden, output, labels = made(23, 8, vocabulary, torch.float64)
            hidden = hidden.detach().to(dtype).requires_grad_()
            output = output.to(dtype)
            # Logits that lie far apart between ranks.
            with torch.no_grad():
                output.weight[: max(1, vocabulary // world)] *= 40
            reference = ChunkedLoss(labels, z_loss=z_loss) if dtype is torch.bfloat16 else plain(labels, z_loss)
            expected = results(reference, hidden, output)
            shard = VocabularyShard.of(vocabulary, context.rank, world, group)
            part = Linear(8, shard.count).to(dtype)
            with torch.no_grad():
                part.weight.copy_(output.weight[shard.first : shard.first + shard.count])
            for loss in (
                ChunkedLoss(labels, shard=shard, z_loss=z_loss, rows=5),
                ChunkedLoss(labels, shard=shard, z_loss=z_loss, rows=5, kernels=KERNELS),
                functools.partial(from_logits, labels, shard, z_loss, None),
            ):
                total, grad_hidden, grad_weight = results(loss, hidden, part)
                grad_hidden = grad_hidden.double()
                dist.all_reduce(grad_hidden)
                own = expected[2][shard.first : shard.first + shard.count]
                limit = 1e-12 if dtype is torch.float64 else 2e-2
                difference = apart((total, grad_hidden, grad_weight), (*expected[:2], own))
                found.append((float(vocabulary), z_loss, difference / limit))
                with torch.no_grad():
                    assert float(loss(hidden, part)) == pytest.approx(float(total), rel=1e-6)
    close_parallel()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_a_vocabulary_of_any_size(world: int) -> None:
    """In parts of the same size, with fewer tokens on the last rank, and with none."""
    for found in run_distributed(shared, [4, 5, 7, 101], world_size=world):
        assert len(found) == 36
        assert not [f for f in found if not f[2] < 1]


def test_it_holds_a_chunk_of_logits_beside_the_gradients() -> None:
    rows, dim, vocabulary = 2048, 16, 4000
    hidden, output, labels = made(rows, dim, vocabulary, torch.float32)
    logits = rows * vocabulary * 4
    chunk = chunk_rows(rows, vocabulary, "cpu") * vocabulary * 4
    assert chunk * 3 < logits
    gradients = sum(4 * t.numel() for t in (hidden, output.weight))
    # What is left are numbers a row, of which there are a few.
    bound = chunk + (4 << 18) + gradients + 64 * rows
    assert peak_of(lambda: results(ChunkedLoss(labels), hidden, output)) <= bound
    assert peak_of(lambda: results(plain(labels), hidden, output)) > 2 * logits
    with torch.no_grad():
        assert peak_of(lambda: ChunkedLoss(labels)(hidden, output)) <= bound - gradients


def test_chunks_are_even_and_within_their_bound() -> None:
    assert chunk_rows(4096, 32_000, "cpu") == 512
    assert chunk_rows(4097, 32_000, "cpu") == 456
    assert chunk_rows(2048, 4096, "cpu") == 512
    assert chunk_rows(100, 10, "cpu") == 100
    assert chunk_rows(16_384, 128_256, "cuda") == 4096
    assert chunk_rows(0, 0, "cuda") == 1
