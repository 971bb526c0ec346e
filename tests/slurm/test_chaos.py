"""A sweep under a storm of faults ends as if nothing had happened."""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.slurm.cluster import NODES, Cluster
from tests.slurm.sweeps import (
    Runs,
    assert_same_runs,
    base,
    give,
    is_finished,
    last_step,
    ranks_of,
    slurm,
    status,
    sweep_command,
    tell,
    undisturbed,
)
from tests.support import record, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(900)]

STEPS, RUNS, FAULTS, SEED = 60, 8, 30, 20
# A machine that is busy with something else could be kept from ever ending by faults that never end.
MOST_FAULTS = 45


class Storm:
    """Faults, by a seeded generator.

    Args:
        cluster: where the sweep runs.
        folder: the sweep's.
    """

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self._cluster, self._rng = cluster, random.Random(SEED)
        runs = Runs(folder).all().values()
        self.dirs = {r.jobs[-1]: Path(r.run_dir) for r in runs}
        self.done: Counter[str] = Counter()
        self._stopped_node: str | None = None

    def unfinished(self) -> list[str]:
        """Jobs whose run has not ended."""
        return [job for job, run_dir in self.dirs.items() if not is_finished(run_dir, STEPS)]

    def pause_s(self) -> float:
        """Until the next fault."""
        return self._rng.uniform(1.5, 4.0)

    def strike(self) -> None:
        """One fault, if it can be done now."""
        kinds: dict[str, Callable[[], bool]] = {
            "rank killed": self._kill_rank,
            "USR2": self._signal,
            "preempted": self._preempt,
            "slurmd stopped": self._restart_node,
            "requeued": self._requeue,
        }
        kind = self._rng.choices(list(kinds), weights=[5, 4, 2, 2, 2])[0]
        if kinds[kind]():
            self.done[kind] += 1

    def _running(self) -> str | None:
        states = {j.id: j.state for j in self._cluster.jobs()}
        running = [job for job in self.unfinished() if states.get(job) == "RUNNING"]
        return self._rng.choice(running) if running else None

    def _kill_rank(self) -> bool:
        job = self._running()
        ranks = ranks_of(self.dirs[job]) if job else []
        if not ranks:
            return False
        try:
            os.kill(self._rng.choice(ranks).pid, signal.SIGKILL)
        except (ProcessLookupError, psutil.NoSuchProcess):
            return False
        return True

    def _signal(self) -> bool:
        job = self._running()
        if job:
            self._cluster.command("scancel", "--signal=USR2", job, check=False)
        return bool(job)

    def _requeue(self) -> bool:
        """An administrator does it, without a warning."""
        job = self._running()
        if job:
            self._cluster.command("scontrol", "requeue", job, check=False)
        return bool(job)

    def _preempt(self) -> bool:
        """A job in the higher partition that needs most of a node."""
        if any(j.name == "preemptor" for j in self._cluster.jobs()):
            return False
        node = self._rng.choice(NODES)
        self._cluster.command(
            "sbatch", "-J", "preemptor", "-p", "high", "-w", node, "--ntasks=14", "-o", "/dev/null",
            "--wrap", "sleep 1",
        )  # fmt: skip
        return True

    def _restart_node(self) -> bool:
        if self._stopped_node is None:
            self._stopped_node = self._rng.choice(NODES)
            self._cluster.stop_node(self._stopped_node)
            return True
        self.mend()
        return False

    def mend(self) -> None:
        """Starts a node that was stopped."""
        if self._stopped_node is not None:
            self._cluster.start_node(self._stopped_node)
            self._stopped_node = None


def compare_status(cluster: Cluster, storm: Storm, folder: Path) -> None:
    """What `status` says was true at some moment between two looks at the queue and the directories."""
    before = {j.id: (j.state, j.started) for j in cluster.jobs()}
    steps = {job: last_step(d) for job, d in storm.dirs.items()}
    rows = {s["job"]: s for s in status(cluster, folder)}
    after = {j.id: (j.state, j.started) for j in cluster.jobs()}
    allowed = {
        "PENDING": ("waiting", "requeued"),
        "RUNNING": ("running", "finished"),
        "COMPLETING": ("ending", "finished"),
    }
    assert rows.keys() == storm.dirs.keys()
    for job, row in rows.items():
        run_dir = storm.dirs[job]
        # One that was requeued and started again in between has another start.
        if before.get(job) == after.get(job) and before.get(job, ("", ""))[0] in allowed:
            assert row["state"] in allowed[before[job][0]], (row, before[job])
        if row["state"] == "finished":
            assert is_finished(run_dir, STEPS)
        folder_steps = {
            int(p.name.removeprefix("step-")) for p in run_dir.glob("checkpoint/step-*") if p.name[5:].isdigit()
        }
        assert set(row["checkpoints"]) <= folder_steps
        if last_step(run_dir) == steps[job]:
            assert row["step"] == steps[job]
        if (run_dir / "run.json").exists():
            assert row["attempts"] <= len(record(run_dir)["attempts"])


def test_a_storm_changes_nothing(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    seeds = f"seed={','.join(str(s) for s in range(RUNS))}"
    grid = [*base(corpus, STEPS, interval=10), "-m", seeds]
    many = ["hydra.launcher.max_requeues=100", "hydra.launcher.max_stuck=30", "run.root=storm"]
    give(cluster, tmp_path, [*grid, *slurm(1.2, *many)])
    folder = tmp_path / "storm"
    storm, looks = Storm(cluster, folder), 0
    deadline = time.monotonic() + 700
    while storm.unfinished():
        if time.monotonic() > deadline:
            raise AssertionError("\n".join(tell(storm.dirs[j]) for j in storm.unfinished()[:2]))
        time.sleep(storm.pause_s())
        if sum(storm.done.values()) < MOST_FAULTS:
            storm.strike()
        else:
            storm.mend()
        if sum(storm.done.values()) % 6 == 5:
            compare_status(cluster, storm, folder)
            looks += 1
    storm.mend()
    print(dict(storm.done), "faults;", looks, "looks")
    wait_until(lambda: not cluster.jobs(), 60.0, 0.5)
    wait_until(lambda: not cluster.step_daemons(), 30.0, 0.5)
    for seed in range(RUNS):
        disturbed = Runs(folder).find(f"seed={seed}")
        assert not ranks_of(disturbed)
        calm = undisturbed(tmp_path / "calm" / str(seed), [*base(corpus, STEPS, interval=10), f"seed={seed}"])
        assert_same_runs(disturbed, calm, STEPS)
    assert sum(storm.done.values()) >= FAULTS
    assert len(storm.done) == 5
    assert looks >= 3
    assert {s["state"] for s in status(cluster, folder)} == {"finished"}
    assert sweep_command(cluster, "resubmit", str(folder)) == "resubmitted: none\n"
