"""Seed checkpoints: one process writes them, any layout starts from them."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from regrow.checkpoint.format.manifest import read_manifest
from tests.runs import train
from tests.support import record, stored_tensors, tiny
from tests.warm import regrow

LAYOUTS = {
    "one": (1, []),
    "fsdp2": (2, ["parallel=fsdp", "parallel.dp_shard=2"]),
    "hsdp4": (4, ["parallel=hsdp", "parallel.dp_replicate=2", "parallel.dp_shard=2"]),
    "tp2": (2, ["parallel.tp=2"]),
    "pp2": (2, ["parallel.pp=2"]),
}


@pytest.fixture(scope="module")
def seed_run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with nothing but a seed checkpoint, made for eight ranks by one process."""
    place = tmp_path_factory.mktemp("seed")
    arguments = tiny(corpus, "hooks=none", "seed=3", "checkpoint=seed", "parallel=fsdp", "parallel.dp_shard=8")
    code, out = regrow([*arguments, "run.name=a"], place)
    assert code == 0, out
    assert "wrote the seed checkpoint" in out
    run = place / "outputs/a"
    assert [p.name for p in (run / "checkpoint").glob("step-*")] == ["step-0"]
    manifest = read_manifest(run / "checkpoint/step-0")
    assert (manifest.kind, manifest.step) == ("model", 0)
    assert not any("optimizer" in name for name in stored_tensors(run / "checkpoint/step-0"))
    # Given again: nothing to do.
    code, out = regrow([*arguments, "run.name=a"], place)
    assert (code, "is there already" in out) == (0, True)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_starts_bitwise_from_it(layout: str, seed_run: Path, corpus: Path, tmp_path: Path) -> None:
    ranks, parallel = LAYOUTS[layout]
    expected = stored_tensors(seed_run / "checkpoint/step-0")
    common = tiny(corpus, "hooks=none", "train.steps=1", "optimizer.lr=0.0", *parallel)
    # By continuing in the same run's directory …
    run = tmp_path / "run"
    shutil.copytree(seed_run, run)
    allowed = ["seed=3", "run.allow_change=[optimizer.lr]"]
    assert train([*common, *allowed], run, world_size=ranks).step == 1
    # … and from another run, whose own first weights are others.
    other = tmp_path / "other"
    train([*common, "seed=4", f"checkpoint.initial_load_path={seed_run}"], other, world_size=ranks)
    for place in (run, other):
        stored = stored_tensors(place / "checkpoint/step-1")
        assert all(torch.equal(stored[name], tensor) for name, tensor in expected.items())
    assert "is a seed checkpoint: weights alone" in (run / "logs/rank-0.log").read_text()
    assert len(record(run)["lineages"]) == 1


@pytest.mark.slow
def test_it_is_the_same_as_starting_without(seed_run: Path, corpus: Path, tmp_path: Path) -> None:
    train(tiny(corpus, "hooks=none", "seed=3", "train.steps=1", "optimizer.lr=0.0"), tmp_path / "run")
    stored = stored_tensors(tmp_path / "run/checkpoint/step-1")
    expected = stored_tensors(seed_run / "checkpoint/step-0")
    assert all(torch.equal(stored[name], tensor) for name, tensor in expected.items())


@pytest.mark.slow
def test_several_processes_and_steps_are_refused(seed_run: Path, corpus: Path, tmp_path: Path) -> None:
    arguments = tiny(corpus, "hooks=none", "seed=3", "checkpoint=seed", "run.name=a", "run.root=.")
    code, out = regrow(arguments, tmp_path, RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29999")
    assert code == 2
    assert "checkpoint.create_seed_checkpoint must be run by 1 process, but 2 were started; start one" in out
    train(tiny(corpus, "hooks=none", "seed=3", "train.steps=1"), tmp_path / "a")
    code, out = regrow(arguments, tmp_path)
    assert code == 2
    assert "must be false where there are steps" in out
    assert json.loads((tmp_path / "a/stop.json").read_text())["step"] == 1
