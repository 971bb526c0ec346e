"""Runs that cannot go on stop with a message, instead of burning the queue."""

import re
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.sweeps import Runs, base, give, history, status
from tests.support import wait_until
from tests.warm import regrow

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(600)]


def test_what_would_only_repeat_itself_is_not_requeued(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    """Side by side: a command that always crashes, one that gets nowhere, bad input, a loss that is not finite."""
    slurm = ["hydra/launcher=slurm", "hydra.launcher.max_requeues=1"]
    plain = base(corpus, 12, "scheduler.warmup_steps=0", "train.grad_clip=0")
    cases = {
        "crash": [*slurm, "hydra.launcher.command=/bin/false", "optimizer.lr=1e-3"],
        "stuck": [
            *slurm,
            "hydra.launcher.command=/bin/false",
            "hydra.launcher.max_requeues=9",
            "hydra.launcher.max_stuck=2",
        ],
        "input": [*slurm, "checkpoint.load_step=7"],
        "nan": [*slurm, "optimizer.lr=1e30"],
    }
    for name, more in cases.items():
        give(cluster, tmp_path, [*plain, *more, f"run.root={name}"])
    wanted = {"crash": "gave up", "stuck": "stuck", "input": "refused", "nan": "failed"}

    def states() -> dict[str, str]:
        return {name: status(cluster, tmp_path / name)[0]["state"] for name in cases}

    wait_until(lambda: states() == wanted, 180.0, 1.0)
    events = {}
    for name in cases:
        (run,) = Runs(tmp_path / name).all().values()
        events[name] = [h["event"] for h in history(Path(run.run_dir))]
    assert events == {
        "crash": ["start", "crashed", "start", "crashed", "gave_up"],
        "stuck": ["start", "crashed", "start", "crashed", "stuck"],
        "input": ["start", "refused"],
        "nan": ["start", "failed"],
    }
    assert "has crashed more than 1 times" in log_of(tmp_path / "crash")
    assert "has started 2 times without reaching a newer checkpoint than step 0" in log_of(tmp_path / "stuck")
    assert "checkpoint.load_step" in log_of(tmp_path / "input")
    assert "the loss of step" in log_of(tmp_path / "nan")
    # Plain lines, and the banner: a job has no terminal.
    assert "\x1b" not in log_of(tmp_path / "nan")
    assert re.search(r"(?m)^\d\d:\d\d:\d\d model {2,}\S", log_of(tmp_path / "nan"))
    wait_until(lambda: not cluster.jobs(), 60.0, 0.5)
    # A waiting sweep says which run it was and ends with 1.
    waiting = ["hydra.launcher.wait=true", "hydra.launcher.poll_s=1", "run.root=nan"]
    code, out = regrow([*plain, *cases["nan"], *waiting], tmp_path, 120.0, **cluster.environ)
    assert code == 1, out
    assert "is failed at step" in out


def log_of(folder: Path) -> str:
    """What the jobs of a sweep printed."""
    return "".join(p.read_text() for p in sorted(folder.glob("slurm/*.log")))
