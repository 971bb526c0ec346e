"""Sweeps without a launcher's file: who is in them, what is still to come, and in which order they are shown."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from regrow.launch.config.errors import UserError
from regrow.launch.sweep.members import find_runs_of_sweep, runs_of_command, sorted_statuses, statuses_in
from regrow.launch.sweep.status import RunStatus
from tests.report.made_runs import make_run


def sweep(root: Path, *tasks: str) -> None:
    root.mkdir(exist_ok=True)
    (root / "multirun.yaml").write_text(yaml.safe_dump({"hydra": {"overrides": {"task": list(tasks)}}}))


def run(root: Path, lr: float, seed: int, **last: float) -> None:
    make_run(
        root / f"m-lr={lr},seed={seed}",
        [{"step": 1, "loss": 9.0}, {"step": 2, "loss": 8.0, **last}],
        overrides=["train.steps=2", f"optimizer.lr={lr}", f"seed={seed}"],
        config={"optimizer": {"lr": lr}, "seed": seed, "train": {"steps": 2}, "checkpoint": {"folder": "checkpoint"}},
        record={
            "format": 1, "run_id": "a", "lineages": [{"id": "0"}],
            "attempts": [{"to_step": 2, "end": "finished", "lineage": "0", "host": "n1"}],
        },
    )  # fmt: skip


def statuses(root: Path) -> list[RunStatus]:
    return statuses_in(find_runs_of_sweep(root, None), None)


def test_runs_that_are_there_and_runs_to_come(tmp_path: Path) -> None:
    sweep(tmp_path, "train.steps=2", "optimizer.lr=0.1,0.2", "seed=1,2")
    run(tmp_path, 0.1, 1, val_loss=7.0)
    run(tmp_path, 0.2, 2)
    found = statuses(tmp_path)
    assert [(s.fields, s.state, s.step, s.steps) for s in found] == [
        ({"optimizer.lr": 0.1, "seed": 1}, "finished", 2, 2),
        ({"optimizer.lr": 0.2, "seed": 2}, "finished", 2, 2),
        ({"optimizer.lr": 0.1, "seed": 2}, "not started", 0, 2),
        ({"optimizer.lr": 0.2, "seed": 1}, "not started", 0, 2),
    ]
    assert (found[0].loss, found[0].val_loss, found[0].attempts, found[0].node) == (8.0, 7.0, 1, "n1")


@pytest.mark.parametrize("body", ["", "hydra: 1", "{hydra: {overrides: {task: [lr=interval(0,1)]}}}", "\x00"])
def test_what_is_no_grid_has_nothing_to_come(tmp_path: Path, body: str) -> None:
    run(tmp_path, 0.1, 1)
    (tmp_path / "multirun.yaml").write_text(body)
    assert len(statuses(tmp_path)) == 1


def test_the_runs_of_a_command(tmp_path: Path) -> None:
    sweep(tmp_path, "optimizer.lr=0.1,0.2", "seed=range(1,3)")
    for lr, seed in ((0.1, 1), (0.2, 2), (0.3, 1), (0.1, 3)):
        run(tmp_path, lr, seed)
    assert [p.name for p in runs_of_command(tmp_path)] == ["m-lr=0.1,seed=1", "m-lr=0.2,seed=2"]


def test_sorting_puts_the_best_first_and_what_has_no_value_last(tmp_path: Path) -> None:
    sweep(tmp_path, "optimizer.lr=0.1,0.2,0.3", "seed=1")
    run(tmp_path, 0.1, 1, val_loss=7.0, **{"eval/t/accuracy": 0.5})
    run(tmp_path, 0.2, 1, val_loss=6.0, **{"eval/t/accuracy": 0.25})

    def order(by: str | None) -> list[Any]:
        return [s.fields["optimizer.lr"] for s in sorted_statuses(statuses(tmp_path), by)]

    assert order(None) == order("val_loss") == [0.2, 0.1, 0.3]
    assert order("eval/t/accuracy") == [0.1, 0.2, 0.3]
    assert order("optimizer.lr") == [0.1, 0.2, 0.3]
    with pytest.raises(UserError, match=r"--sort must be a measure .* but is val_los; use one of .*val_loss"):
        order("val_los")


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "regrow.launch.commands.sweep", *map(str, arguments)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_the_command_shows_any_sweep(tmp_path: Path) -> None:
    sweep(tmp_path, "optimizer.lr=0.1,0.2", "seed=1")
    run(tmp_path, 0.1, 1, val_loss=7.0)
    run(tmp_path, 0.2, 1, val_loss=6.0)
    done = command("status", tmp_path, "--best", "--json")
    assert done.returncode == 0, done.stderr
    (best,) = json.loads(done.stdout)
    assert (best["fields"], best["val_loss"]) == ({"optimizer.lr": 0.2}, 6.0)
    shown = command("status", tmp_path, "--sort", "loss")
    assert all(word in shown.stdout for word in ("optimizer.lr", "finished", "7.0000"))
    for arguments in (
        ("resubmit", tmp_path),
        ("status", tmp_path / "m-lr=0.1,seed=1/.hydra"),
    ):
        refused = command(*arguments)
        assert refused.returncode == 2
        assert refused.stderr.startswith("error: DIR must be")
