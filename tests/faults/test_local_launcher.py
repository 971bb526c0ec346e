"""Several runs at once on this machine: stopped, killed, continued, and refused when they do not fit."""

import os
import re
import signal
from pathlib import Path

import psutil
import pytest

from tests.runs import train
from tests.support import curve, metrics, record, tiny, wait_until
from tests.warm import regrow, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LOCAL = ["hydra/launcher=local", "hydra.launcher.n_jobs=2", "hydra.launcher.cpus=2"]


def runs_in(folder: Path) -> list[Path]:
    return sorted(p.parent for p in folder.glob("*/run.json"))


def trainers(folder: Path) -> list[int]:
    """Living processes that train a run below `folder`."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and any(
                f"hydra.run.dir='{folder}" in a for a in process.cmdline()
            ):
                found.append(process.pid)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def test_runs_side_by_side_stop_die_and_go_on(corpus: Path, tmp_path: Path) -> None:
    alone = tiny(corpus, "hooks=none", "checkpoint.interval=150", "train.steps=400")
    grid = [*alone, *LOCAL, "-m", "seed=1,2"]
    folder = tmp_path / "outputs"

    def both_train(steps: int) -> bool:
        return len(runs_in(folder)) == 2 and all(len(metrics(r)) >= steps for r in runs_in(folder))

    launcher = start(grid, tmp_path)
    wait_until(lambda: both_train(5), 90.0, 0.05)
    launcher.send_signal(signal.SIGTERM)
    out, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 3, out
    assert "Traceback" not in out
    reached = {r: record(r)["attempts"][-1] for r in runs_in(folder)}
    assert all(
        a["end"] == "terminated" and (r / f"checkpoint/step-{a['to_step']}").exists() for r, a in reached.items()
    )

    launcher = start(grid, tmp_path)
    wait_until(lambda: all(len(record(r)["attempts"]) == 2 for r in reached), 90.0, 0.05)
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.communicate()
    # Nobody goes on without the launcher.
    wait_until(lambda: not trainers(folder), 20.0, 0.1)

    code, out = regrow(grid, tmp_path, 300.0)
    assert code == 0, out
    for run_dir, attempt in reached.items():
        assert record(run_dir)["attempts"][1]["from_step"] == attempt["to_step"]
        (seed,) = re.findall(r"seed=\d", run_dir.name)
        assert train([*alone, seed], tmp_path / "alone" / seed).kind == "finished"
        assert curve(run_dir) == curve(tmp_path / "alone" / seed)
    code, out = regrow([*grid, "hydra.launcher.cpus=1", "parallel.dp_shard=2"], tmp_path)
    assert code == 2
    assert "hydra.launcher.cpus must be at least a run's ranks × launch.threads_per_rank (2), but is 1" in out
