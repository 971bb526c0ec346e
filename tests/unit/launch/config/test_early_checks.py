"""What is refused before Hydra composes is refused in the words that composing it would have given."""

import re
from pathlib import Path

import pytest
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from regrow.errors import ConfigError
from regrow.launch.config.early_checks import check_overrides
from regrow.launch.config.errors import describe
from tests.composing import compose_config

WRONG = (
    ["optimizer.lrr=3"],
    ["train.stepz=3"],
    ["trian.steps=4"],
    ["model.rope_scaling.facter=3"],
    ["model.head_dim=3"],
    ["model=qwen3_debug", "model.head_dimm=4"],
    ["checkpoint.export.every=3"],
    ["model.path=x"],
    ["train.steps=many"],
    ["train.steps=null"],
    ["launch.device=tpu"],
    ["run.allow_change=optimizer.lr"],
    ["hooks.sample.tokenz=3"],
    ["hooks.validation.every=often"],
    ["+hook@hooks.evaluation=evaluation", "hooks.evaluation.taks=[]"],
    ["model=llama3_9b"],
    ["precision=fp16"],
)


def early(overrides: list[str]) -> str | None:
    try:
        check_overrides(overrides)
    except (ConfigError, OmegaConfBaseException) as error:
        return describe(error)
    return None


def composed(overrides: list[str]) -> str | None:
    try:
        compose_config(overrides)
    except (ConfigError, HydraException, OmegaConfBaseException) as error:
        return describe(error)
    return None


@pytest.mark.parametrize("overrides", WRONG, ids=lambda o: o[-1])
def test_the_sentence_is_the_one_that_hydra_leads_to(overrides: list[str]) -> None:
    sentence = early(overrides)
    assert sentence is not None
    assert sentence == composed(overrides)


def test_each_of_several_choices_is_looked_at() -> None:
    """Hydra names no choices there."""
    sentence = early(["logger=[csv,nonsense]"])
    assert sentence is not None
    assert re.fullmatch(r"logger must be one of csv, .*, but is 'nonsense'; choose one of them", sentence)
    assert early(["logger=[csv,tensorboard]"]) is None


@pytest.mark.parametrize(
    "overrides",
    [
        ["optimizer.lr=3e-4", "train.steps=3", "seed=2"],
        ["model=qwen3_moe_debug", "model.n_experts=4", "model.balance=auxiliary"],
        ["+data_source@data.sources.web=text", "data=mixture", "data.sources.web.weight=0.5"],
        ["+hook@hooks.evaluation=evaluation", "hooks.evaluation.tasks=[a]"],
        ["checkpoint=production", "checkpoint.save_policies.minutes.minutes=5"],
        ["train.compile=true", "parallel.reshard_after_forward=2", "run.name=${oc.env:HOME}"],
        ["hydra.job.name=x", "~hooks.sample", "experiment=demo", "data.tokenizer=null"],
        ["+checkpoint.storage_options.region=x", "checkpoint.storage_options.endpoint=y"],
        ["hooks.sample.enabled=false", "hooks=none", "hooks.sample={}"],
        ["hooks.mine.x=3"],
        ["launch.timeout_s=5", "precision=bf16", "+experiment=demo"],
    ],
    ids=lambda o: o[0],
)
def test_what_is_right_passes(overrides: list[str]) -> None:
    assert early(overrides) is None


def test_a_sweep_is_checked_by_its_names() -> None:
    assert early(["-m", "optimizer.lr=1e-3,3e-4", "model=llama3_debug,qwen3_debug"]) is None
    assert early(["-m", "optimizer.lrr=1e-3,3e-4"]) == "optimizer.lrr is not a field; did you mean optimizer.lr?"
    assert early(["hydra/launcher=joblib"]) is None


def test_what_a_folder_of_the_users_may_bring_is_left_to_hydra(tmp_path: Path) -> None:
    assert early([f"--config-dir={tmp_path}", "model=mine", "optimizer.mine=3"]) is None
    assert early(["experiment=demo", "optimizer.lrr=3"]) is None
