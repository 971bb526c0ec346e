"""A run folder and a step as commit 5d27da2 wrote them load and go on, whatever has changed since.

`recorded.json` was written by that commit: the hashes of the step's tensors, its train state, the samples of each
step, and the rows that followed when the run was continued.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from regrow.checkpoint.load.open_source import open_source, read_whole
from tests.runs import train
from tests.support import compose_config, metrics, record, samples, stored_tensors

HERE = Path(__file__).parent
KEPT = HERE / "run_5d27da2"
RECORDED: dict[str, Any] = json.loads((KEPT / "recorded.json").read_text())
NAMES: list[dict[str, Any]] = json.loads((HERE / "run_names.json").read_text())


def command(run_dir: Path, *more: str) -> list[str]:
    """The command that made the run, with its corpus where it lies now."""
    made = (KEPT / "run/.hydra/overrides.yaml").read_text().splitlines()
    moved = ("data.files=", "data.tokenizer=", "run.root=", "run.name=", "train.steps=")
    given = [line.removeprefix("- ") for line in made]
    return [
        *(o for o in given if not o.startswith(moved)),
        f"data.files=[{KEPT / 'text.jsonl'}]",
        f"data.tokenizer={KEPT / 'tokenizer.json'}",
        f"run.root={run_dir.parent}",
        f"run.name={run_dir.name}",
        *more,
    ]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A copy of the run that may change."""
    shutil.copytree(KEPT / "run", tmp_path / "run")
    return tmp_path / "run"


def digests(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {
        name: {
            "dtype": str(t.dtype).removeprefix("torch."),
            "shape": list(t.shape),
            "sha256": hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest(),
        }
        for name, t in tensors.items()
    }


def test_its_tensors_are_read_bitwise() -> None:
    step = KEPT / "run/checkpoint/step-8"
    with open_source(step) as source:
        ours = {name: read_whole(source, name) for name in RECORDED["tensors"]}
    assert digests(ours) == RECORDED["tensors"]
    assert digests(stored_tensors(step)) == RECORDED["tensors"]


@pytest.mark.slow
def test_it_continues_with_the_same_samples_and_losses(run_dir: Path) -> None:
    assert train(command(run_dir, "train.steps=11"), run_dir).kind == "finished"
    new = metrics(run_dir)[8:]
    assert [r["step"] for r in new] == [r["step"] for r in RECORDED["next"]]
    for row, then in zip(new, RECORDED["next"], strict=True):
        assert row["lr"] == then["lr"]
        assert row["loss"] == pytest.approx(then["loss"], abs=1e-5)
        assert row["grad_norm"] == pytest.approx(then["grad_norm"], rel=1e-5)
    assert samples(run_dir) == RECORDED["samples"]
    assert record(run_dir)["attempts"][-1]["from_step"] == RECORDED["train_state"]["step"] == 8
    assert record(run_dir)["run_id"] == json.loads((KEPT / "run/run.json").read_text())["run_id"]


def test_its_state_is_the_one_that_was_saved(run_dir: Path) -> None:
    """Continued to where it is already, it says that it has finished, and nothing is set aside."""
    assert train(command(run_dir, "train.steps=8"), run_dir).kind == "finished"
    manifest = json.loads((run_dir / "checkpoint/step-8/manifest.json").read_text())
    assert manifest["train_state"] == RECORDED["train_state"]


@pytest.mark.parametrize("row", NAMES, ids=lambda row: " ".join(row["command"]) or "default")
def test_commands_name_the_runs_that_they_named(row: dict[str, Any]) -> None:
    assert compose_config(row["command"]).run.name == row["name"]
