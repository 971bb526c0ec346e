"""The tests' way of composing gives what Hydra gives."""

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from regrow.launch.config import composition
from tests.composing import compose_config


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model=qwen3_moe_debug", "parallel=fsdp_tp", "model.dim=48", "train.steps=3", "model.n_heads=6"],
        [
            "hooks=none",
            "+hook@hooks.mine=validation",
            "hooks.mine.max_batches=7",
            "data=text",
            "data.files=[a,'b c']",
        ],
        ["checkpoint=debug", "++train.steps=2", "+run.allow_change=[seed]", "experiment=demo"],
        ["hydra/launcher=basic", "hydra.verbose=true", "optimizer.lr=1e-3"],
    ],
)
def test_the_same_config(overrides: list[str]) -> None:
    found, expected = compose_config(overrides), composition.compose_config(overrides)
    assert OmegaConf.to_container(found) == OmegaConf.to_container(expected)
    with pytest.raises(OmegaConfBaseException):
        found.nothing_of_the_sort = 1
    # What a test does to its config does not reach the next test.
    found.train.steps = 987
    assert compose_config(overrides).train.steps == expected.train.steps


@pytest.mark.parametrize("override", ["model.nonsense=1", "model=nonsense", "train.steps=x", "train.steps="])
def test_the_same_refusal(override: str) -> None:
    with pytest.raises(Exception) as expected:
        composition.compose_config([override])
    with pytest.raises(type(expected.value)) as found:
        compose_config([override])
    assert str(found.value) == str(expected.value)
