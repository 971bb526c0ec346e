"""Qwen3: published sizes, heads, experts, balance, parts."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regrow.launch.run.build import build_model
from regrow.models.init import fill_shard
from regrow.models.moe import MixtureOfExperts, add_loss
from regrow.models.qwen3.config import Balance, Qwen3Config, Qwen3MoeConfig
from regrow.models.qwen3.model import Qwen3Moe
from regrow.models.rope import apply_rope, apply_rope_halves, rope_frequencies, rope_table
from tests.support import TINY_MODEL, typed_config

# Of the published weights, tied embeddings counted once.
PUBLISHED = {
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200,
    "qwen3_32b": 32_762_123_264,
    "qwen3_moe_30b_a3b": 30_532_122_624,
    "qwen3_moe_235b_a22b": 235_093_634_560,
}
TINY_MOE = [
    "model=qwen3_moe_debug",
    *(o for o in TINY_MODEL if "ffn_dim" not in o),
    "model.head_dim=16",
    "model.n_experts=6",
    "model.expert_ffn_dim=24",
]


def tiny_moe(*overrides: str) -> Qwen3Moe:
    model = build_model(typed_config([*TINY_MOE, *overrides]))
    assert isinstance(model, Qwen3Moe)
    model.init_buffers(torch.device("cpu"), 64)
    for name, parameter in model.named_parameters():
        offset = (0,) * parameter.ndim
        rule = model.init_rules()[name]
        fill_shard(parameter.data, name=name, rule=rule, global_shape=parameter.shape, offset=offset, seed=1)
    return model


@pytest.mark.parametrize(("variant", "count"), PUBLISHED.items())
def test_published_parameter_counts(variant: str, count: int) -> None:
    with torch.device("meta"):
        model = build_model(typed_config([f"model={variant}"]))
    assert sum(p.numel() for p in model.parameters()) == count


def test_active_weights_of_the_published_mixtures() -> None:
    """A3B and A22B: the weights that a token meets, the embedding aside."""
    for variant, active in {"qwen3_moe_30b_a3b": 3.0e9, "qwen3_moe_235b_a22b": 21.6e9}.items():
        with torch.device("meta"):
            assert build_model(typed_config([f"model={variant}"])).flops_per_token(0) / 6 == pytest.approx(
                active, rel=0.02
            )


def test_names_are_torchtitans() -> None:
    names = {n for n, _ in tiny_moe().named_parameters()}
    for name in ("attention.q_norm.weight", "moe.router.gate.weight", "moe.experts.w1", "ffn_norm.weight"):
        assert f"layers.1.{name}" in names
    assert "layers.0.moe.expert_bias" in tiny_moe().state_dict()
    assert "layers.0.moe.load" not in tiny_moe().state_dict()


def naive_mixture(moe: MixtureOfExperts, x: Tensor) -> Tensor:
    """Token by token, expert by expert."""
    out = torch.zeros_like(x)
    scores = F.linear(x, moe.router.gate.weight).softmax(-1)
    for token in range(x.shape[0]):
        best = (scores[token] + moe.expert_bias).topk(2).indices
        weights = scores[token, best] / scores[token, best].sum()
        for expert, weight in zip(best.tolist(), weights, strict=True):
            w1, w2, w3 = (getattr(moe.experts, n)[expert] for n in ("w1", "w2", "w3"))
            out[token] += weight * (w2 @ (F.silu(w1 @ x[token]) * (w3 @ x[token])))
    return out


def test_experts_compute_what_a_loop_computes() -> None:
    moe = tiny_moe().get_submodule("layers.0.moe")
    assert isinstance(moe, MixtureOfExperts)
    moe.expert_bias[3] = 0.3
    x = torch.randn(10, 32, requires_grad=True)
    torch.testing.assert_close(moe(x[None], None)[0], naive_mixture(moe, x))
    weights = [x, *moe.parameters()]
    got = torch.autograd.grad(moe(x[None], None).square().sum(), weights)
    expected = torch.autograd.grad(naive_mixture(moe, x).square().sum(), weights)
    torch.testing.assert_close(got, expected)


def test_load_counts_each_choice_once_and_no_padding() -> None:
    moe = tiny_moe().get_submodule("layers.0.moe")
    assert isinstance(moe, MixtureOfExperts)
    valid = torch.tensor([[True] * 5, [False] * 5])
    x = torch.randn(2, 5, 32, requires_grad=True)
    out = torch.utils.checkpoint.checkpoint(moe, x, valid, use_reentrant=False)
    out.sum().backward()
    assert moe.load.sum() == 5 * 2
    with torch.no_grad():
        moe.eval()(x, None)
    assert moe.load.sum() == 5 * 2


def test_load_counts_beyond_what_float32_can() -> None:
    moe = tiny_moe().get_submodule("layers.0.moe")
    assert isinstance(moe, MixtureOfExperts)
    moe.load.fill_(2**24)
    moe(torch.randn(1, 5, 32), None)
    assert int(moe.load.sum()) == 2**24 * len(moe.load) + 5 * 2


def test_the_auxiliary_loss_is_least_when_even_and_ignores_padding() -> None:
    overrides = ["model.n_experts=4", "model.experts_per_token=1", "model.auxiliary_coefficient=1.0"]
    moe = tiny_moe("model.balance=auxiliary", *overrides).get_submodule("layers.0.moe")
    assert isinstance(moe, MixtureOfExperts)
    even = torch.eye(4).repeat(1, 2).reshape(8, 4)[:4] * 1.0
    chosen = torch.arange(4)[:, None]
    shape = torch.Size((1, 4))
    balanced = moe._balance_loss(even.softmax(-1), chosen, shape, None)
    lopsided = moe._balance_loss(F.one_hot(torch.zeros(4).long(), 4).float(), torch.zeros(4, 1).long(), shape, None)
    assert float(balanced) == pytest.approx(1.0)
    assert float(lopsided) == pytest.approx(4.0)
    nothing = moe._balance_loss(even.softmax(-1), chosen, shape, torch.zeros(1, 4).bool())
    assert float(nothing) == 0.0


def test_a_loss_added_on_the_way_reaches_its_weights() -> None:
    x, w = torch.ones(3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    torch.autograd.backward(add_loss(x, 5 * w).sum() * 0.5)
    assert w.grad is not None
    assert float(w.grad) == 5.0
    assert x.grad is not None
    assert x.grad.tolist() == [0.5] * 3


def test_both_rotations_are_one_up_to_a_permutation() -> None:
    table, x = rope_table(rope_frequencies(8, 1e4), 6), torch.randn(2, 6, 3, 8)
    shuffled = torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1)
    out = apply_rope(x, table)
    expected = torch.cat([out[..., 0::2], out[..., 1::2]], dim=-1)
    torch.testing.assert_close(apply_rope_halves(shuffled, table), expected)


@pytest.mark.parametrize("tied", ["true", "false"])
def test_parts_in_a_row_are_the_whole(tied: str) -> None:
    model = tiny_moe(f"model.tied_embeddings={tied}").eval()
    parts = [model.part([0], first=True, last=False), model.part([1], first=False, last=True)]
    tokens = torch.randint(0, 320, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(parts[1](parts[0](tokens)), model(tokens))
    whole = dict(model.named_parameters())
    names = [n for part in parts for n, _ in part.named_parameters()]
    assert set(names) == set(whole)
    assert all(p is whole[n] for part in parts for n, p in part.named_parameters())
    shared = {n for n in names if names.count(n) > 1}
    assert shared == ({"tok_embeddings.weight"} if tied == "true" else set())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.head_dim=7"], "model.head_dim must be even for RoPE, but is 7; use 8"),
        (["model.experts_per_token=9"], "model.experts_per_token must be at most model.n_experts (6), but is 9"),
        (["model.n_kv_heads=3"], "model.n_kv_heads must divide model.n_heads (4), but is 3"),
        (["model.bias_update_speed=-1"], "model.bias_update_speed must be at least 0, but is -1"),
        (["model.n_experts=0"], "model.n_experts must be at least 1, but is 0"),
    ],
)
def test_impossible_dimensions_are_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ValueError) as caught:
        typed_config([*TINY_MOE, *overrides]).model.check()
    assert words in str(caught.value)


def test_defaults_of_the_family() -> None:
    dense, mixture = typed_config(["model=qwen3_debug"]).model, typed_config(["model=qwen3_moe_debug"]).model
    assert isinstance(dense, Qwen3Config)
    assert isinstance(mixture, Qwen3MoeConfig)
    assert (dense.rope_theta, dense.norm_eps, dense.head_width) == (1e6, 1e-6, 32)
    assert (mixture.balance, mixture.norm_topk_prob) == (Balance.bias, True)
