"""What loggers' stores hold after kills, after going back, and after a failure; read by each library's own reader."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.log_stores import csv_rows, wandb_entries
from tests.support import metrics, record, tiny, wait_until
from tests.warm import regrow, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ALL = "logger=[wandb,tensorboard,csv,mlflow,trackio]"
# What is computed again is the same; how long it takes is not.
SAME = ("loss", "grad_norm", "lr", "tokens", "val_loss")


def stores(root: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """See `tests.log_stores`."""
    command = [sys.executable, "-P", "-m", "tests.log_stores", str(root)]
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "PYTHONPATH": path}
    )
    found: dict[str, dict[str, list[dict[str, Any]]]] = json.loads(done.stdout.splitlines()[-1])
    return found


def same_values(logger: str, row: Mapping[str, Any]) -> dict[str, float]:
    """A row's values that must repeat, rounded as the logger does it."""
    kept = {name: row[name] for name in SAME if row.get(name) is not None}
    return {k: float(np.float32(v)) for k, v in kept.items()} if logger == "tensorboard" else kept


def test_each_step_stands_once_in_every_store_after_three_kills(corpus: Path, tmp_path: Path) -> None:
    arguments = tiny(
        corpus, ALL, "+hook@hooks.slow=throttle", "hooks.validation.every=25", "hooks.validation.max_batches=1",
        "hooks.sample.enabled=false", "train.steps=160", "checkpoint.interval=10", "run.name=a",
    )  # fmt: skip
    root, run_dir = tmp_path / "outputs", tmp_path / "outputs/a"

    def killed_when(seconds: float, condition: Callable[[], bool]) -> None:
        process = start([*arguments, f"hooks.slow.seconds={seconds}"], tmp_path)
        wait_until(lambda: condition() or process.poll() is not None, timeout_s=300, every_s=0.005)
        assert process.poll() is None, process.communicate()[0]
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()

    # While libraries are still imported.
    killed_when(0.02, lambda: len(metrics(run_dir)) > 12)
    # In the middle of what all of them write, with rows in their stores that the next start computes again.
    notes = run_dir / "loggers"
    killed_when(0.5, lambda: len(list(notes.glob("*.json"))) == 5 and 4 < len(metrics(run_dir)) % 10 < 9)
    # Anywhere.
    more = len(metrics(run_dir)) + random.Random(3).randrange(15, 25)
    killed_when(0.05, lambda: len(metrics(run_dir)) > more)
    code, out = regrow([*arguments, "hooks.slow.seconds=0"], tmp_path, timeout_s=300)
    assert code == 0, out
    assert len(record(run_dir)["attempts"]) == 4
    written = metrics(run_dir)
    assert [row["step"] for row in written] == list(range(1, 161))
    # A lineage that goes back leaves all of that as it is, and goes on beside it.
    code, out = regrow([*arguments, "hooks.slow.seconds=0", "checkpoint.load_step=130"], tmp_path, timeout_s=300)
    assert code == 0, out
    lineage = record(run_dir)["lineages"][-1]["id"]
    found = stores(root)
    assert len(found) == 5
    for logger, runs in found.items():
        (child,) = [name for name in runs if lineage in name]
        (main,) = runs.keys() - {child}
        for name, expected in ((main, written), (child, metrics(run_dir)[130:])):
            assert [row["step"] for row in runs[name]] == [row["step"] for row in expected], (logger, name)
            for row, own in zip(runs[name], expected, strict=True):
                assert same_values(logger, row) == same_values(logger, own), (logger, name)


def test_steps_with_other_numbers_go_into_a_child_run(corpus: Path, tmp_path: Path) -> None:
    """A changed hyperparameter makes other numbers of steps that the store has already."""
    slow = ["+hook@hooks.slow=throttle", "hooks.slow.seconds=0.05", "hooks=none", "checkpoint.interval=10"]
    arguments = tiny(corpus, "logger=csv", *slow, "train.steps=40", "run.name=a")
    run_dir = tmp_path / "outputs/a"
    process = start(arguments, tmp_path)
    main = run_dir / "metrics.csv"
    wait_until(lambda: main.exists() and main.read_bytes().count(b"\n") > 15)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    held = [row["step"] for row in csv_rows(tmp_path / "outputs")["a/metrics.csv"]]
    changed = [*arguments, "optimizer.lr=1e-4", "run.allow_change=[optimizer.lr]", "hooks.slow.seconds=0"]
    code, out = regrow(changed, tmp_path)
    assert code == 0, out
    begun = record(run_dir)["attempts"][-1]["from_step"]
    assert held == list(range(1, len(held) + 1))
    assert len(held) > begun >= 10
    found = csv_rows(tmp_path / "outputs")
    assert [row["step"] for row in found.pop("a/metrics.csv")] == held
    ((_, rows),) = found.items()
    assert [(r["step"], r["loss"]) for r in rows] == [(r["step"], r["loss"]) for r in metrics(run_dir)[begun:]]


def test_wandb_is_told_of_the_project_of_samples_of_checkpoints_and_of_the_end(corpus: Path, tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    note = tmp_path / "note.txt"
    note.write_text("as committed\n")
    for command in (["init", "-q"], ["add", "note.txt"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    revision = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    note.write_text("changed since\n")
    # A step so large ends the run by a loss that is not finite.
    broken = ["optimizer.lr=1e30", "scheduler.warmup_steps=0", "train.grad_clip=0", "train.steps=30"]
    # The first save is durable before the step that fails.
    every = ["hooks.sample.every=1", "hooks.sample.tokens=4", "checkpoint.enable_first_step_checkpoint=true",
             "checkpoint.async_mode=disabled"]  # fmt: skip
    code, out = regrow(tiny(corpus, "logger=wandb", "wandb.artifacts=true", "run.name=a", *broken, *every), tmp_path)
    assert code == 1, out
    (file,) = (tmp_path / "outputs/a/wandb").glob("offline-run-*/*.wandb")
    entries = list(wandb_entries(file))
    configs = [u for e in entries for u in e.config.update] + [u for e in entries for u in e.run.config.update]
    about = next(json.loads(u.value_json) for u in configs if u.key == "regrow")
    assert (about["git"], about["uncommitted"], about["diff_is_cut"]) == (revision, True, False)
    diff = (file.parent / "files/uncommitted.diff").read_text()
    assert "+changed since" in diff
    history = [{i.key or i.nested_key[0] for i in e.history.item} for e in entries if e.history.item]
    # In the row of its step.
    assert any({"samples", "train/global_step"} <= keys for keys in history)
    artifacts = [e.request.log_artifact.artifact for e in entries] + [e.artifact for e in entries]
    assert any(a.name == "a-checkpoint" and a.type == "model" for a in artifacts)
    alerts = [e.alert for e in entries if e.alert.title]
    assert [a.title for a in alerts] == ["a failed"]
    assert "is not finite" in alerts[0].text or "loss of step" in alerts[0].text


def test_a_broken_logger_stops_nothing(corpus: Path, tmp_path: Path) -> None:
    """Each has a file where its folder should be."""
    run_dir = tmp_path / "outputs/a"
    (run_dir / "metrics.csv").mkdir(parents=True)
    for path in (run_dir / "wandb", run_dir / "tensorboard", tmp_path / "outputs/trackio"):
        path.touch()
    (tmp_path / "outputs/mlflow.db").write_text("no database\n" * 1000)
    code, out = regrow(tiny(corpus, ALL, "train.steps=3", "hooks=none", "run.name=a"), tmp_path)
    assert code == 0, out
    assert len(metrics(run_dir)) == 3
    for title in ("W&B", "TensorBoard", "The CSV file", "MLflow", "Trackio"):
        assert out.count(f"{title} failed (") == 1, out
