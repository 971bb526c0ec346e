"""The cost of a token out of the config is that of the model."""

import pytest
import torch

from regrow.launch.run.build import build_model
from regrow.trainer.report.flops import flops_per_token
from tests.support import settings_of, typed_config


@pytest.mark.parametrize(
    "model",
    [
        "llama3_8b",
        "qwen3_4b",
        "qwen3_moe_30b_a3b",
        "qwen3_moe_debug model.n_shared_experts=1",
        "qwen3_debug model.window=64",
    ],
)
def test_as_the_model_counts(model: str) -> None:
    overrides = [f"model={model.split()[0]}", *model.split()[1:], "data.seq_len=256"]
    with torch.device("meta"):
        built = build_model(typed_config(overrides))
    assert flops_per_token(settings_of(overrides)) == pytest.approx(built.flops_per_token(256), rel=1e-12)


@pytest.mark.parametrize("config", [{}, {"model": {"dim": 8}, "data": {"seq_len": 4}}, {"model": 1, "data": 2}])
def test_a_model_of_another_kind_has_none(config: dict[str, object]) -> None:
    assert flops_per_token(config) is None
