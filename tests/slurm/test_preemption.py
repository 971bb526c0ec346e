"""Runs on a real Slurm, stopped in every way that it has: each ends as it would have undisturbed."""

import os
import resource
import signal
import time
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.sweeps import (
    Runs,
    assert_same_runs,
    base,
    give,
    history,
    kill_rank,
    last_step,
    slurm,
    undisturbed,
    wait_finished,
    wait_for_step,
)
from tests.support import record, regrow, start, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(600)]

STEPS = 120
LONG = 200
SEEDS = "seed=1,2,3,4"


def _children_s() -> float:
    """Seconds of the processor that processes took which this one has waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_a_sweep_outlives_its_login_and_every_kind_of_stop(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    """Four runs of two ranks on two nodes each, and one that reaches its wall limit."""
    grid = [*base(corpus, STEPS, "parallel.dp_shard=2"), "-m", SEEDS]
    # What the processor is worth while other tests have the cores too.
    before_s = _children_s()
    code, out = regrow([*grid[:-2], "--cfg", "job"], tmp_path)
    assert code == 0, out
    shown_s = _children_s() - before_s
    login = start([*grid, *slurm(0.1, "hydra.launcher.nodes=2"), "run.root=sweep"], tmp_path, **cluster.environ)
    sweep = tmp_path / "sweep" / "sweep.json"
    wait_until(lambda: sweep.exists() and all(r.jobs for r in Runs(sweep.parent).all().values()), 30.0, 0.02)
    submitted_s = sum(psutil.Process(login.pid).cpu_times()[:4])
    os.killpg(login.pid, signal.SIGKILL)
    login.communicate()
    print(f"submitted in {submitted_s:.2f} s of the processor; one config is shown in {shown_s:.2f}")
    # Each of the four runs is composed once, and nothing heavy is imported.
    assert submitted_s < 5.0 * shown_s
    limited = [*slurm(0.25, "hydra.launcher.time=2"), "run.root=limited"]
    give(cluster, tmp_path, [*base(corpus, 250, interval=200), *limited])
    runs = Runs(tmp_path / "sweep")
    dirs = {seed: runs.find(f"seed={seed}") for seed in (1, 2, 3, 4)}
    (limited_dir,) = [Path(r.run_dir) for r in Runs(tmp_path / "limited").all().values()]

    wait_for_step(dirs[1], 25)
    cluster.command("scancel", "--signal=USR2", runs.job("seed=1"))
    wait_for_step(dirs[2], 25)
    at_kill = last_step(dirs[2])
    kill_rank(dirs[2], 1)
    wait_for_step(dirs[3], 25)
    cluster.stop_node("n2")
    time.sleep(3.0)
    cluster.start_node("n2")
    wait_finished(cluster, {str(k): d for k, d in dirs.items()}, STEPS)
    wait_finished(cluster, [limited_dir], 250)

    attempts = {seed: record(d)["attempts"] for seed, d in dirs.items()}
    # Nothing is lost on a signal, at most an interval on a kill.
    assert attempts[1][0]["end"] == "preempted"
    assert attempts[1][1]["from_step"] == attempts[1][0]["to_step"] >= 25
    assert len(attempts[2]) == 2
    assert at_kill - 20 <= attempts[2][1]["from_step"]
    assert len(attempts[4]) == 1
    ends = [a["end"] for a in record(limited_dir)["attempts"]]
    assert ends[-1] == "finished"
    assert set(ends[:-1]) == {"preempted"}, "the wall limit was not reached"
    assert [h["event"] for h in history(limited_dir)][:3] == ["start", "preempted", "start"]
    assert_no_step_lost(limited_dir)

    for seed, run_dir in dirs.items():
        one = [*base(corpus, STEPS, "parallel.dp_shard=2"), f"seed={seed}"]
        assert_same_runs(run_dir, undisturbed(tmp_path / "here" / str(seed), one, ranks=2), STEPS)
    assert_same_runs(limited_dir, undisturbed(tmp_path / "whole", base(corpus, 250, interval=200)), 250)


def assert_no_step_lost(run_dir: Path) -> None:
    """Every start goes on where the one before had stopped."""
    attempts = record(run_dir)["attempts"]
    for before, after in pairwise(attempts):
        assert after["from_step"] == before["to_step"], attempts


def test_scancel_saves_and_only_the_preempted_task_comes_back(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    """An array of two runs of two ranks; each takes a node's GPUs, so a job in the higher partition preempts one."""
    config = base(corpus, LONG, "parallel.dp_shard=2", interval=200)
    there = slurm(0.1, "hydra.launcher.gpus_per_node=2", "run.root=sweep")
    give(cluster, tmp_path, [*config, *there, "-m", "seed=1,2"])
    runs = Runs(tmp_path / "sweep")
    kept, last = runs.find("seed=1"), runs.find("seed=2")
    wait_for_step(kept, 5)
    wait_for_step(last, 5)
    node = next(j.nodes for j in cluster.jobs() if j.id == runs.job("seed=2"))
    high = cluster.command(
        "sbatch", "--parsable", "-p", "high", "-w", node, "--gpus-per-node=2", "-o", "/dev/null", "--wrap", "sleep 2"
    ).strip()
    wait_until(lambda: [h["event"] for h in history(last)].count("start") == 2, 120.0, 0.2)
    assert cluster.state(high) in ("GONE", "RUNNING", "COMPLETING")
    assert [h["event"] for h in history(kept)] == ["start"]
    # The other one is cancelled by its user while it runs, and does not come back.
    cluster.command("scancel", runs.job("seed=1"))
    wait_until(lambda: cluster.state(runs.job("seed=1")) == "GONE", 60.0, 0.2)
    attempt = record(kept)["attempts"][-1]
    assert attempt["end"] == "terminated"
    assert attempt["to_step"] == last_step(kept) < LONG
    assert (kept / f"checkpoint/step-{attempt['to_step']}").exists()
    wait_finished(cluster, [last], LONG)
    assert_no_step_lost(last)
    assert [h["event"] for h in history(last)] == ["start", "stopped", "start", "finished"]
    assert [h["event"] for h in history(kept)] == ["start", "stopped"]
    assert cluster.state(runs.job("seed=1")) == "GONE"
    assert_same_runs(last, undisturbed(tmp_path / "whole", [*config, "seed=2"], ranks=2), LONG)
