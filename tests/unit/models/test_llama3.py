"""Llama 3: published sizes, initialisation, masks, causality."""

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from regrow.models.config import AttentionKernel
from regrow.models.documents import Documents, describe_documents
from regrow.models.init import InitRule, fill_shard
from regrow.models.llama3.config import Llama3Config
from regrow.models.llama3.model import Llama3
from regrow.models.rope import apply_rope, rope_frequencies, rope_table
from regrow.trainer.parallel.attention import prepare_documents
from tests.support import TINY_MODEL, typed_config

# Parameter counts of Meta's releases, tied embeddings counted once.
PUBLISHED = {
    "llama3_1b": 1_235_814_400,
    "llama3_3b": 3_212_749_824,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_405b": 405_853_388_800,
}


def tiny_config(**changes: int) -> Llama3Config:
    config = typed_config(TINY_MODEL).model
    assert isinstance(config, Llama3Config)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def tiny_model() -> Llama3:
    model = Llama3(tiny_config())
    model.init_buffers(torch.device("cpu"), 64)
    for name, parameter in model.named_parameters():
        rule = model.init_rules()[name]
        fill_shard(
            parameter.data,
            name=name,
            rule=rule,
            global_shape=parameter.shape,
            offset=(0,) * parameter.ndim,
            seed=1,
        )
    return model


@pytest.mark.parametrize(("variant", "count"), PUBLISHED.items())
def test_published_parameter_counts(variant: str, count: int) -> None:
    config = typed_config([f"model={variant}"]).model
    assert isinstance(config, Llama3Config)
    with torch.device("meta"):
        model = Llama3(config)
    assert sum(p.numel() for p in model.parameters()) == count


def test_debug_has_one_to_five_million_parameters() -> None:
    config = typed_config([]).model
    assert isinstance(config, Llama3Config)
    with torch.device("meta"):
        count = sum(p.numel() for p in Llama3(config).parameters())
    assert 1_000_000 <= count <= 5_000_000


def test_parameter_names_are_metas() -> None:
    names = {n for n, _ in tiny_model().named_parameters()}
    assert {"tok_embeddings.weight", "norm.weight", "output.weight"} < names
    assert {"layers.0.attention.wq.weight", "layers.1.feed_forward.w2.weight", "layers.0.ffn_norm.weight"} < names


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 9),
    cuts=st.lists(st.integers(0, 40), max_size=4),
    column_cut=st.integers(0, 9),
)
def test_any_sharding_starts_from_the_same_weights(rows: int, columns: int, cuts: list[int], column_cut: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("regrow.models.init.BLOCK_ELEMENTS", 16)
        rule, shape = InitRule(std=0.5), (rows, columns)

        def shard(top: int, bottom: int, left: int, right: int) -> torch.Tensor:
            out = torch.empty(bottom - top, right - left)
            fill_shard(out, name="w", rule=rule, global_shape=shape, offset=(top, left), seed=3)
            return out

        whole = shard(0, rows, 0, columns)
        edges = sorted({0, rows, *(c for c in cuts if c < rows)})
        middle = min(column_cut, columns)
        for top, bottom in itertools.pairwise(edges):
            assert torch.equal(shard(top, bottom, 0, middle), whole[top:bottom, :middle])
            assert torch.equal(shard(top, bottom, middle, columns), whole[top:bottom, middle:])


def test_initialisation_depends_on_seed_and_name() -> None:
    def fill(name: str, seed: int) -> torch.Tensor:
        out = torch.empty(8, 8)
        fill_shard(out, name=name, rule=InitRule(std=1.0), global_shape=(8, 8), offset=(0, 0), seed=seed)
        return out

    assert torch.equal(fill("a", 1), fill("a", 1))
    assert not torch.equal(fill("a", 1), fill("b", 1))
    assert not torch.equal(fill("a", 1), fill("a", 2))


def test_later_tokens_do_not_change_earlier_logits() -> None:
    model, tokens = tiny_model(), torch.randint(0, 320, (2, 16))
    changed = tokens.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 320
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10:], after[:, 10:])


def described(documents: Tensor) -> Documents:
    return prepare_documents(describe_documents(documents), [0], AttentionKernel.sdpa, None)


def test_document_mask_hides_the_document_before() -> None:
    model, tokens = tiny_model(), torch.randint(0, 320, (1, 16))
    documents = (torch.arange(16) >= 6).long()[None]
    changed = tokens.clone()
    changed[:, :6] = (changed[:, :6] + 1) % 320
    with torch.no_grad():
        before, after = model(tokens, described(documents)), model(changed, described(documents))
        unmasked = model(changed)
    torch.testing.assert_close(before[:, 6:], after[:, 6:])
    assert not torch.allclose(before[:, 6:], unmasked[:, 6:])


def test_one_document_masks_like_causal() -> None:
    model, tokens = tiny_model(), torch.randint(0, 320, (2, 12))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), model(tokens, described(torch.zeros(2, 12).long())))


def test_rope_depends_on_distance_alone() -> None:
    table = rope_table(rope_frequencies(8, 10_000.0), 32)
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def product(i: int, j: int) -> float:
        return float((apply_rope(q, table[i : i + 1]) * apply_rope(k, table[j : j + 1])).sum())

    assert product(3, 1) == pytest.approx(product(20, 18), abs=1e-5)
    assert product(3, 1) != pytest.approx(product(20, 10), abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_real_and_complex_rotations_are_bitwise_equal(dtype: torch.dtype) -> None:
    """A compiler is given real numbers, a CPU complex ones: outputs and gradients are the same."""
    table = rope_table(rope_frequencies(16, 10_000.0), 32)
    x = torch.randn(2, 32, 3, 16, dtype=dtype, requires_grad=True)
    grad, real = torch.randn_like(x), torch.compile(apply_rope, backend="eager", fullgraph=True)
    outs = [apply_rope(x, table), real(x.detach().requires_grad_(), table), real(x, table)]
    grads = [torch.autograd.grad(out, x, grad)[0] for out in (outs[0], outs[2])]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(grads[0], grads[1])


def test_rope_scaling_follows_llama_31() -> None:
    plain = rope_frequencies(128, 500_000.0)
    scaled = rope_frequencies(
        128, 500_000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192
    )
    wavelengths = 2 * torch.pi / plain
    short, long = wavelengths < 8192 / 4, wavelengths > 8192
    torch.testing.assert_close(scaled[short], plain[short])
    torch.testing.assert_close(scaled[long], plain[long] / 8)
    between = ~short & ~long
    assert between.any()
    assert ((scaled < plain) & (scaled > plain / 8))[between].all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_heads": 5}, "model.n_heads must divide model.dim (32), but is 5; use 2 or 4 or 8"),
        ({"n_kv_heads": 3}, "model.n_kv_heads must divide model.n_heads (4), but is 3"),
        ({"n_layers": 0}, "model.n_layers must be at least 1, but is 0"),
        ({"n_heads": 32, "n_kv_heads": 32}, "must be even for RoPE"),
    ],
)
def test_impossible_dimensions_are_refused(changes: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError) as caught:
        tiny_config(**changes).check()
    assert words in str(caught.value)


def test_tied_embeddings_share_one_parameter() -> None:
    config = tiny_config()
    config.tied_embeddings = True
    model = Llama3(config)
    assert model.output.weight is model.tok_embeddings.weight
    assert "output.weight" not in dict(model.named_parameters())
