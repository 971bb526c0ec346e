"""The numbers of the banner; that it is said is shown by tests/faults/test_display.py."""

from math import prod

import pytest

from regrow.launch.run.banner import parameter_counts
from regrow.launch.run.weights import shapes_of
from tests.support import typed_config


def test_a_dense_model_uses_all_of_its_parameters() -> None:
    total, active = parameter_counts(typed_config(["model=llama3_8b"]).model)
    assert total == active == 8_030_261_248


@pytest.mark.parametrize("variant", ["qwen3_moe_debug", "qwen3_moe_30b_a3b"])
def test_a_token_goes_through_some_experts(variant: str) -> None:
    config = typed_config([f"model={variant}"]).model
    total, active = parameter_counts(config)
    assert total == sum(map(prod, shapes_of(config).values()))
    assert active < total
    if variant == "qwen3_moe_30b_a3b":
        # As its model card says: 30.5 B and 3.3 B.
        assert (total // 10**8, active // 10**8) == (305, 33)
