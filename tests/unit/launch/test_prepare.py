"""From a config to what ranks are told, without any rank."""

import dataclasses
import os
import pickle
from pathlib import Path

import pytest

from regrow.launch.config.identity import config_hash
from regrow.launch.config.later_fields import later_defaults
from regrow.launch.config.refusals import Refused
from regrow.launch.config.schema import Device
from regrow.launch.config.typed import to_config, to_dict
from regrow.launch.run.prepare import convert_config, prepare_run
from regrow.launch.run.rank_spec import Outcome, RankSpec
from regrow.launch.run.ranks import RANK_VARIABLES
from regrow.launch.run.signals import StopFlag
from regrow.launch.run.start import run_spec
from regrow.trainer.config import ParallelConfig
from tests.pool import run_distributed
from tests.support import REPO, compose_config, tiny

pytestmark = pytest.mark.slow

CHOICES = [
    [],
    ["model=qwen3_debug", "optimizer.lr=1", "hooks=none"],
    ["model=from_hf", f"model.path={REPO / 'tests/interop/qwen3_folder'}"],
    ["checkpoint.load_rename=['a=>b']", "+save_policy@checkpoint.save_policies.mine=on_best", "logger=wandb"],
    ["run.extend=hold", "launch.elastic=[2,4]", "scheduler=cosine", "precision=bf16"],
]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher started this process."""
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("overrides", CHOICES, ids=lambda o: ",".join(o[:1]))
def test_a_typed_config_is_the_same_run_as_a_composed_one(overrides: list[str]) -> None:
    composed = compose_config(overrides)
    config, settings = convert_config(composed)
    again, same = convert_config(config)
    assert (again, same) == (config, settings)
    assert config_hash(same) == config_hash(to_dict(composed))


def test_the_spec_says_everything_that_a_rank_needs(corpus: Path, tmp_path: Path) -> None:
    overrides = tiny(corpus, f"run.root={tmp_path}", "run.name=mine", "launch.device=cpu")
    config = compose_config(overrides)
    spec = prepare_run(config, overrides=overrides, sweep="grid")
    assert spec.run_dir == tmp_path / "mine"
    assert (spec.device_type, spec.layout.world_size, spec.given_ranks) == ("cpu", 1, False)
    assert (spec.sweep, spec.overrides) == ("grid", overrides)
    assert spec.config_hash == config_hash(spec.config_dict, later_defaults(spec.config))
    assert (spec.data_folders[""] / "tokenizer.json").is_file()
    assert pickle.loads(pickle.dumps(spec)) == spec
    # Nothing of the run is there before it is opened.
    assert list(spec.run_dir.iterdir()) == []
    assert prepare_run(to_config(config), overrides=overrides, sweep="grid") == spec


def test_ranks_that_were_given_are_told_to_torch(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    config = compose_config(tiny(corpus, "parallel.dp_shard=-1", "launch.device=cpu"))
    spec = prepare_run(config, tmp_path / "run")
    assert (spec.given_ranks, spec.layout.dp_shard) == (True, 2)
    assert os.environ["MASTER_PORT"] == "29500"
    # Ranks that the caller starts are none of torchrun's.
    own = prepare_run(config, tmp_path / "run", world_size=4)
    assert (own.given_ranks, own.layout.dp_shard) == (False, 4)


def test_a_seed_checkpoint_is_written_by_one_process_on_cpus(corpus: Path, tmp_path: Path) -> None:
    overrides = tiny(corpus, "checkpoint=seed", "parallel.tp=2", "launch.device=cuda")
    spec = prepare_run(compose_config(overrides), tmp_path / "run")
    assert spec.layout.world_size == 1
    assert (spec.config.parallel, spec.config.launch.device) == (ParallelConfig(), Device.cpu)
    # The run stores what was asked for.
    assert spec.config_dict["parallel"]["tp"] == 2


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["train.steps=0"], "train.steps must be at least 1, but is 0; use 100"),
        (["train.z_loss=-0.1"], "train.z_loss must be at least 0, but is -0.1; use 1e-4"),
        (["parallel.tp=3"], "the product of parallel.tp (3) must be the number of ranks that were started"),
        (["data.files=[/nowhere/*.txt]"], "data.files"),
        (["model.vocab_size=200"], "model.vocab_size must be at least the tokenizer's"),
        (["optimizer.eps=0"], "optimizer.eps must be above 0, but is 0.0; use 1e-8"),
        (["data._target_=os.system"], "data._target_ must begin with one of"),
        (["model=from_hf"], "model.path must be set, but is missing"),
    ],
)
def test_what_is_refused_is_one_sentence_and_leaves_no_folder(
    overrides: list[str], sentence: str, corpus: Path, tmp_path: Path
) -> None:
    config = compose_config(overrides if "model=from_hf" in overrides else tiny(corpus, *overrides))
    with pytest.raises(Refused) as refused:
        prepare_run(config, tmp_path / "run", world_size=1)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_a_prepared_run_is_run(corpus: Path, tmp_path: Path) -> None:
    """Opened, trained and found finished, as the command does it."""
    overrides = tiny(corpus, "train.steps=2", "hooks=none", "checkpoint=disabled", "launch.device=cpu")
    spec = prepare_run(compose_config(overrides), tmp_path / "run", overrides=overrides)
    assert run_distributed(_run_twice, spec, world_size=1) == [["finished", "finished"]]
    changed = dataclasses.replace(spec, config=dataclasses.replace(spec.config, seed=5))
    changed.config_dict["seed"] = 5
    with pytest.raises(Refused, match=r"must keep its model, data and seed, but seed"):
        run_spec(changed, StopFlag())


def _run_twice(spec: RankSpec) -> list[str]:
    outcomes: list[Outcome] = [run_spec(spec, StopFlag()) for _ in range(2)]
    return [o.kind for o in outcomes]
