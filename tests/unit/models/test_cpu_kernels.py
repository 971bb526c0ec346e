"""The CPU's own kernels against torch's, in values and gradients."""

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regrow.models.cpu import Case, Kind, causal_attention, has_kernel, is_used, linear, rms_norm, use
from regrow.models.kernels import cases_of
from regrow.models.layers import attend
from regrow.models.linear import Linear
from regrow.trainer.loss import summed_cross_entropy
from tests.support import typed_config

Function = Callable[..., Tensor]


def torchs_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def torchs_loss(logits: Tensor, labels: Tensor) -> Tensor:
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(exact.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def results(function: Function, inputs: Sequence[Tensor], *rest: object) -> list[Tensor]:
    """The output, and the gradients for an output gradient that depends on nothing but its shape."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves, *rest)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(out.dtype)
    out.backward(grad)  # type: ignore[no-untyped-call]
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]


def errors(function: Function, reference: Function, inputs: Sequence[Tensor], *rest: object) -> list[float]:
    """Relative errors of `function` beside `reference` in float64."""
    ours = results(function, inputs, *rest)
    exact = results(reference, [x.double() for x in inputs], *rest)
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, exact, strict=True)]


def attention_inputs(length: int, heads: int, key_heads: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    q = torch.randn(2, length, heads, 16) * 2
    return [q.to(dtype), *(torch.randn(2, length, key_heads, 16).to(dtype) for _ in range(2))]


@pytest.mark.parametrize(
    ("length", "heads", "key_heads"), [(2, 2, 1), (7, 4, 4), (64, 4, 2), (65, 6, 3), (200, 4, 1)]
)
def test_attention_is_torchs(length: int, heads: int, key_heads: int) -> None:
    inputs = attention_inputs(length, heads, key_heads, torch.float64)
    assert max(errors(causal_attention, torchs_attention, inputs)) < 1e-13
    single = [x.float() for x in inputs]
    assert max(errors(causal_attention, torchs_attention, single)) < 1e-6


def test_attention_in_bfloat16_is_as_exact_as_torchs() -> None:
    inputs = attention_inputs(256, 4, 2, torch.bfloat16)
    ours, theirs = (errors(f, torchs_attention, inputs) for f in (causal_attention, torchs_attention))
    assert all(a < 1.5 * b for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


def test_attention_takes_views_that_are_not_contiguous() -> None:
    torch.manual_seed(0)
    whole = torch.randn(2, 20, 8, 16)
    q, k, v = whole[:, :, :4], whole[:, :, 4:6], whole[:, :, 6:]
    torch.testing.assert_close(causal_attention(q, k, v), torchs_attention(q, k, v))


def test_operators_of_attention_are_described_rightly() -> None:
    inputs = [x.requires_grad_() for x in attention_inputs(9, 4, 2, torch.float64)]
    torch.library.opcheck(torch.ops.regrow.causal_attention.default, tuple(inputs))


@pytest.fixture
def chosen() -> Iterator[None]:
    """Afterwards nothing is chosen, as at the start."""
    yield
    use([])


@pytest.mark.usefixtures("chosen")
def test_attend_takes_torchs_kernel_with_a_mask() -> None:
    q, k, v = attention_inputs(12, 4, 2, torch.float32)
    use([Case(Kind.attention, torch.float32, (2, 12, 4, 2, 16))])
    mask = torch.ones(12, 12, dtype=torch.bool).tril()
    torch.testing.assert_close(attend(q, k, v, mask), attend(q, k, v, None))


@pytest.mark.parametrize("features", [(5, 3), (3, 5)])
def test_linear_is_torchs(features: tuple[int, int]) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 6, features[0]), torch.randn(features[1], features[0])]
    # FSDP warns of modules that return views.
    assert not linear(*inputs)._is_view()
    assert max(errors(linear, F.linear, inputs)) < 1e-6


def test_linear_casts_master_weights_and_gives_them_their_gradient() -> None:
    torch.manual_seed(0)
    layer, x = Linear(8, 6), torch.randn(3, 8).bfloat16()
    out = layer(x)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(out, F.linear(x, layer.weight.bfloat16()))
    torch.testing.assert_close(layer.weight.grad, x.float().sum(0).expand(6, 8), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.float64, 1e-14), (torch.bfloat16, 5e-3)])
def test_rms_norm_is_torchs(dtype: torch.dtype, limit: float) -> None:
    torch.manual_seed(0)
    # More rows than a block has.
    x, weight = (torch.randn(*s).to(dtype) for s in ((2, 150, 700), (700,)))
    assert max(errors(rms_norm, lambda a, w, eps: F.rms_norm(a, (700,), w, eps), [x, weight], 1e-5)) < limit


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.float64, 1e-14), (torch.bfloat16, 3e-3)])
def test_loss_is_torchs(dtype: torch.dtype, limit: float) -> None:
    torch.manual_seed(0)
    logits, labels = (torch.randn(2, 40, 9000) * 3).to(dtype), torch.randint(0, 9000, (2, 40))
    labels[0, :3] = -100
    ours, exact = (
        results(f, [x], labels) for f, x in ((summed_cross_entropy, logits), (torchs_loss, logits.double()))
    )
    assert float(ours[0]) == pytest.approx(float(exact[0]), rel=1e-6)
    assert float((ours[1].double() - exact[1]).norm() / exact[1].norm()) < limit
    assert not ours[1][0, :3].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [32_000, 128_256])
def test_loss_is_exact_over_large_vocabularies(vocabulary: int, dtype: torch.dtype) -> None:
    """Every logit but the highest adds the same to the sum, so that errors do not cancel."""
    logits = torch.full((1, 6, vocabulary), -0.1, dtype=dtype)
    logits[..., 7] = 0.3
    labels = torch.tensor([[7, 8, 9, -100, 10, 11]])
    exact = float(torchs_loss(logits.double(), labels))
    assert float(summed_cross_entropy(logits, labels)) == pytest.approx(exact, rel=1e-7)


@pytest.mark.parametrize("features", [768, 16_384])
def test_rms_norm_is_exact_over_many_features_and_rows(features: int) -> None:
    inputs = [torch.full((400, features), 0.1), torch.full((features,), 0.7)]
    reference = lambda x, w, eps: F.rms_norm(x, (features,), w, eps)  # noqa: E731
    assert max(errors(rms_norm, reference, inputs, 1e-5)[::2]) < 2e-7


def test_loss_without_gradients_and_with_no_label_that_counts() -> None:
    logits, labels = torch.randn(1, 4, 10), torch.full((1, 4), -100)
    with torch.no_grad():
        assert float(summed_cross_entropy(logits, labels)) == 0.0
    logits.requires_grad_()
    summed_cross_entropy(logits, labels).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert not logits.grad.any()


def test_a_second_backward_pass_through_the_loss_is_refused() -> None:
    logits, labels = torch.randn(1, 4, 10, requires_grad=True), torch.randint(0, 10, (1, 4))
    loss = summed_cross_entropy(logits, labels)
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]


@pytest.mark.usefixtures("chosen")
def test_kernels_stand_in_for_what_was_chosen_alone() -> None:
    class Special(Tensor):
        pass

    sizes, x = (3, 4), torch.ones(3, 4)
    assert not is_used(Kind.norm, sizes, x)
    use([Case(Kind.norm, torch.float32, sizes)])
    assert is_used(Kind.norm, sizes, x)
    assert not is_used(Kind.norm, (4, 3), x)
    assert not is_used(Kind.norm, sizes, x.double())
    assert not is_used(Kind.product, sizes, x)
    assert not is_used(Kind.norm, sizes, x.as_subclass(Special))
    assert not is_used(Kind.norm, sizes, torch.ones(3, 4, device="meta"))
    compiled = torch.compile(lambda t: t + is_used(Kind.norm, sizes, t), backend="eager", fullgraph=True)
    assert compiled(x).sum() == x.sum()


@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize("kind", ["llama3_debug", "qwen3_debug", "qwen3_moe_debug"])
def test_every_case_of_a_model_is_met_in_its_forward_pass(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from regrow.launch.run.build import build_model

    model = build_model(typed_config([f"model={kind}"]))
    model.init_buffers(torch.device("cpu"), 16)
    expected, met = cases_of(model, 2, 16, torch.float32), set[Case]()

    def note(kind: Kind, sizes: tuple[int, ...], x: Tensor, *_: Tensor) -> bool:
        met.add(Case(kind, x.dtype, sizes))
        return False

    for module in ("regrow.models.attention", "regrow.models.layers", "regrow.models.linear"):
        monkeypatch.setattr(f"{module}.is_used", note)
    model(torch.zeros(2, 16, dtype=torch.int64))
    assert set(expected) == {c for c in met if has_kernel(c)}
    assert {c.kind for c in expected} >= {Kind.attention, Kind.norm}
