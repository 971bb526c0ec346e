"""`regrow.compose` gives what the command would use, and `import regrow` costs nothing."""

import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

import regrow
from regrow.launch.config.typed import to_dict
from tests.support import settings_of

LAZY = """
import sys
import regrow
assert set(regrow.__all__) <= set(dir(regrow))
assert not {"torch", "hydra", "omegaconf", "numpy", "pyarrow"} & set(sys.modules)
from regrow import read_metrics, runs
assert callable(read_metrics), callable(runs)
assert regrow.__version__
for name in regrow.__all__:
    assert getattr(regrow, name) is not None
try:
    regrow.trainn
except AttributeError as error:
    assert "trainn" in str(error)
else:
    raise AssertionError("a name that is not there must raise")
"""


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model=qwen3_moe_debug", "optimizer.lr=3e-4", "parallel=fsdp", "parallel.dp_shard=2"],
        ["experiment=demo", "checkpoint=production", "precision=bf16", "hooks.sample.prompts=['a b',c]"],
    ],
)
def test_it_is_the_commands_config(overrides: list[str]) -> None:
    config = regrow.compose(overrides)
    assert to_dict(OmegaConf.structured(config)) == settings_of(overrides)


def test_it_leaves_a_hydra_of_the_callers_alone() -> None:
    with initialize_config_module("regrow.conf", version_base="1.3"):
        assert regrow.compose(["seed=3"]).seed == 3
        assert compose("config", overrides=["seed=4"]).seed == 4


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["train.stepz=3"], "train.stepz is not a field; did you mean train.steps?"),
        (["train.steps=a"], "train.steps must be a whole number, but is 'a'"),
        (["checkpoint.exclude_from_loading=optimizer"], "write checkpoint.exclude_from_loading=\\[optimizer\\]"),
        (["--train.steps=3"], "write train.steps=3"),
        (["-m", "seed=1"], "takes overrides alone, but is given -m"),
        (["seed=1,2"], "seed must have one value"),
        ("seed=1", "takes a list of overrides"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        regrow.compose(overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_importing_it_loads_nothing_heavy(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-P", "-c", LAZY], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
