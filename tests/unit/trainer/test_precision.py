"""What a precision makes of a model, and what it refuses."""

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchao.float8.float8_linear import Float8Linear

from regrow.errors import ConfigError
from regrow.launch.run.build import build_model, check_optimizer
from regrow.launch.run.preflight import check_config
from regrow.models.base import LanguageModel
from regrow.models.moe import Router
from regrow.trainer.config import Float8Recipe, PrecisionConfig, PrecisionName
from regrow.trainer.gradient_sum import GradientSum
from regrow.trainer.optimizer import AdamW, Optimizer
from regrow.trainer.precision import change_precision, check_precision
from tests.support import TINY_MODEL, typed_config

FP8 = PrecisionConfig(name=PrecisionName.fp8, fp8_min_features=0)
MOE = ["model=qwen3_moe_debug", "model.vocab_size=320"]


def made(overrides: list[str], precision: PrecisionConfig, *, device_type: str = "cpu", tp: int = 1) -> LanguageModel:
    """A model on the meta device, changed."""
    with torch.device("meta"):
        model = build_model(typed_config(overrides))
    change_precision(model, precision, device_type=device_type, tp=tp)
    return model


def filled(model: LanguageModel) -> LanguageModel:
    """The same model on the CPU with small weights, computing in bfloat16."""
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.05)
    model.init_buffers(torch.device("cpu"), 64)
    model.compute_dtype = torch.bfloat16
    return model


@pytest.mark.parametrize("overrides", [TINY_MODEL, MOE], ids=["dense", "moe"])
def test_with_a_bound_of_0_every_linear_but_output_and_router_multiplies_in_8_bits(overrides: list[str]) -> None:
    model = made(overrides, FP8)
    routers = {m for r in model.modules() if isinstance(r, Router) for m in r.modules()}
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m not in routers}
    linears.pop("output")
    assert len(linears) >= 2 * 4
    assert all(isinstance(m, Float8Linear) for m in linears.values())
    assert sum(isinstance(m, Float8Linear) for m in model.modules()) == len(linears)
    plain = made(overrides, PrecisionConfig())
    assert {n: (p.shape, p.dtype) for n, p in model.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in plain.named_parameters()
    }


def test_small_and_odd_layers_stay() -> None:
    """Bounds are of the whole matrix; on GPUs a rank's part must fit, too."""
    sizes = [*TINY_MODEL, "model.dim=64", "model.ffn_dim=96"]

    def converted(bound: int, *more: str, **where: Any) -> set[str]:
        precision = PrecisionConfig(name=PrecisionName.fp8, fp8_min_features=bound)
        model = made([*sizes, *more], precision, **where)
        return {
            n.removeprefix("layers.0.")
            for n, m in model.named_modules()
            if isinstance(m, Float8Linear) and ".0." in n
        }

    whole = {f"attention.{w}" for w in ("wq", "wk", "wv", "wo")} | {f"feed_forward.{w}" for w in ("w1", "w2", "w3")}
    assert converted(32) == whole
    assert converted(33) == whole - {"attention.wk", "attention.wv"}
    assert converted(65) == set()
    assert converted(0, "model.ffn_dim=100") == {n for n in whole if "attention" in n}
    assert converted(0, device_type="cuda", tp=4) == {"attention.wq", "attention.wo"}


# The root mean square of a relative rounding error is the half of the last place over sqrt(3): of factors with 3 bits
# after the point (e4m3, forward) and with 2 (e5m2, gradients).
E4M3, E5M2 = 2.0**-4 / 3**0.5, 2.0**-3 / 3**0.5
# The longest way of a gradient through two layers goes through 8 products, as the activations that it meets have: each
# adds the errors of its two factors, independent of the others; what residual connections carry past is exact.
GRADIENT_ERROR = (8 * (E5M2**2 + E4M3**2) + 8 * (E4M3**2 + E4M3**2)) ** 0.5


@pytest.mark.parametrize("recipe", Float8Recipe)
def test_logits_in_8_bits_are_near_those_in_bfloat16_and_others(recipe: Float8Recipe) -> None:
    tokens = torch.arange(48).view(2, 24) * 7 % 320
    models = [
        filled(made(TINY_MODEL, p))
        for p in (PrecisionConfig(), PrecisionConfig(name=PrecisionName.fp8, fp8_recipe=recipe, fp8_min_features=0))
    ]
    bf16, fp8 = (m(tokens).float() for m in models)
    difference = float((fp8 - bf16).detach().abs().max())
    assert 1e-4 < difference < 0.1 * float(bf16.detach().abs().max())
    fp8.logsumexp(-1).sum().backward()
    bf16.logsumexp(-1).sum().backward()
    for (name, a), (_, b) in zip(models[1].named_parameters(), models[0].named_parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert float((a.grad - b.grad).norm() / b.grad.norm()) < GRADIENT_ERROR, name


def test_bfloat16_parameters_leave_tables_and_biases_as_they_are() -> None:
    model = filled(made(MOE, PrecisionConfig(name=PrecisionName.bf16_params)))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for n, b in model.named_buffers() if "expert_bias" in n} == {torch.float32}
    optimizer = AdamW(typed_config([]).optimizer, model)  # type: ignore[arg-type]
    state = optimizer.state_tensors()
    assert {t.dtype for n, t in state.items() if not n.endswith(".step")} == {torch.bfloat16}


def test_gradients_of_micro_batches_are_added_up_in_float32() -> None:
    """A hundred of 1 and one of 256: bfloat16 has no number between 256 and 258."""
    parameter = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    frozen = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    sums = GradientSum([parameter, frozen])
    for value in (256.0, *[1.0] * 100):
        (parameter * value).sum().backward()  # type: ignore[no-untyped-call]
        sums.take()
        assert parameter.grad is None
    sums.give()
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [356.0] * 3
    assert frozen.grad is None


REFUSED = {
    "no torchao": (["precision=fp8"], "cpu", r"precision.name must not be fp8 without torchao, but is; install it with pip install 'regrow\[fp8\]', or use precision=bf16"),
    "an older GPU": (["precision=fp8"], "cuda", r"precision.name must not be fp8 on A100, whose compute capability \(8.0\) is below 8.9 .* but is; use precision=bf16"),
    "a bound": (["precision.fp8_min_features=-1"], "cpu", "precision.fp8_min_features must be at least 0, but is -1; use 1024"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides, device_type, message = REFUSED[case]
    if case == "no torchao":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")
    with pytest.raises(ConfigError, match=message):
        check_precision(typed_config(overrides).precision, device_type)


class RoundsToNearest(Optimizer):
    """What one's own optimizer is unless it says otherwise."""

    def step(self, lr: float, grad_scale: Tensor, skip: Tensor) -> None: ...

    def zero_grad(self) -> None: ...

    def reset(self) -> None: ...

    def state_tensors(self) -> dict[str, Tensor]:
        return {}


def test_an_optimizer_that_would_lose_updates_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = typed_config([*TINY_MODEL, "precision=bf16_params"])
    check_optimizer(config)
    monkeypatch.setattr("regrow.trainer.optimizer.RoundsToNearest", RoundsToNearest, raising=False)
    config.optimizer._target_ = "regrow.trainer.optimizer.RoundsToNearest"
    with pytest.raises(
        ConfigError, match=r"optimizer must round stochastically .* use optimizer=adamw or precision=bf16"
    ):
        check_config(config)
