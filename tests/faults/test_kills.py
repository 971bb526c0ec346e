"""The real command, killed anywhere: what grows back is what would have been."""

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import assert_same_tensors, curve, metrics, record, samples, tiny, wait_until
from tests.warm import regrow, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def command(corpus: Path, *more: str) -> list[str]:
    """Forty steps of some tens of milliseconds each."""
    wide = ["model.dim=128", "model.ffn_dim=512", "model.n_layers=4", "data.seq_len=64"]
    schedule = ["train.steps=40", "checkpoint.interval=10", "checkpoint.keep_latest_k=0"]
    return tiny(corpus, *wide, "data.global_batch_size=16", "data.log_samples=true", *schedule, *more)


def workers(launcher: int) -> list[psutil.Process]:
    """The ranks' processes below a launcher."""
    try:
        children = psutil.Process(launcher).children()
        return [c for c in children if "regrow.launch.run.worker" in c.cmdline()]
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


def ranks_of(run_dir: Path) -> list[int]:
    """Living processes that hold a run's files open."""
    found = []
    for process in psutil.process_iter():
        try:
            files = [f.path for f in process.open_files()]
        except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        if any(f.startswith(str(run_dir)) for f in files) and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process.pid)
    return found


def partials(run_dir: Path) -> list[str]:
    folder = run_dir / "checkpoint"
    return [p.name for p in folder.iterdir() if ".partial-" in p.name] if folder.is_dir() else []


class Killer:
    """Starts the command and kills it at a moment of choice."""

    def __init__(self, arguments: list[str], cwd: Path, run_dir: Path, ranks: int) -> None:
        self.arguments, self.cwd, self.run_dir, self.ranks = arguments, cwd, run_dir, ranks
        self.saves_hit = self.steps_hit = 0

    def _steps(self) -> int:
        return len(metrics(self.run_dir))

    def kill(self, whom: str, moment: str) -> None:
        """One start and one kill.

        Args:
            whom: `launcher`, `rank` or `group`.
            moment: `early` (while starting), `step` (after a first new step), `save` (inside a save).
        """
        before, stale = self._steps(), set(partials(self.run_dir))
        process = start(self.arguments, self.cwd)
        if moment == "early":
            wait_until(lambda: self.ranks == 1 or len(workers(process.pid)) == self.ranks)
        elif moment == "step":
            # Rows beyond the newest checkpoint were dropped when training began, so any new row is progress.
            began = record(self.run_dir)["attempts"] if (self.run_dir / "run.json").exists() else []
            wait_until(lambda: len(self._attempts()) > len(began))
            base = self._attempts()[-1]["from_step"]
            wait_until(lambda: self._steps() > base)
        else:
            wait_until(lambda: bool(set(partials(self.run_dir)) - stale) or process.poll() is not None)
        victims = {"launcher": [process.pid], "rank": [w.pid for w in workers(process.pid)][-1:]}.get(whom)
        if whom == "group" or not victims:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            os.kill(victims[0], signal.SIGKILL)
        out, _ = process.communicate(timeout=60)
        assert process.returncode != 0, out
        # Nobody goes on writing, whoever was killed.
        wait_until(lambda: not ranks_of(self.run_dir), timeout_s=15.0, every_s=0.1)
        self.saves_hit += moment == "save" and bool(set(partials(self.run_dir)) - stale)
        self.steps_hit += moment == "step" and self._steps() >= min(before, 1)

    def _attempts(self) -> list[dict[str, Any]]:
        return list(record(self.run_dir)["attempts"]) if (self.run_dir / "run.json").exists() else []


@pytest.mark.parametrize("degrees", [[], ["parallel=fsdp", "parallel.dp_shard=2"]], ids=["one_rank", "fsdp2"])
def test_ten_kills_change_nothing(corpus: Path, tmp_path: Path, degrees: list[str]) -> None:
    ranks = 2 if degrees else 1
    code, out = regrow(command(corpus, *degrees, "run.name=whole"), tmp_path)
    assert code == 0, out
    run_dir = tmp_path / "outputs" / "cut"
    killer = Killer(command(corpus, *degrees, "run.name=cut"), tmp_path, run_dir, ranks)
    whom = ["launcher", "rank", "group"]
    plan = ["early", "step", "save", "step", "save", "step", "save", "step", "save", "step"]
    for i, moment in enumerate(plan):
        killer.kill(whom[i % 3], moment)
    assert killer.steps_hit >= 3
    assert killer.saves_hit >= 2
    code, out = regrow(killer.arguments, tmp_path)
    assert code == 0, out
    whole = tmp_path / "outputs" / "whole"
    assert [r["step"] for r in metrics(run_dir)] == list(range(1, 41))
    assert curve(run_dir) == curve(whole)
    assert samples(run_dir) == samples(whole)
    assert_same_tensors(run_dir / "checkpoint/step-40", whole / "checkpoint/step-40")
    assert partials(run_dir) == []
    assert len(record(run_dir)["attempts"]) >= 6


def test_a_rewound_run_killed_and_given_again_goes_on(corpus: Path, tmp_path: Path) -> None:
    """`load_step` acts once, also for a requeue."""
    code, out = regrow(command(corpus, "run.name=a"), tmp_path)
    assert code == 0, out
    run_dir = tmp_path / "outputs" / "a"
    before, order = curve(run_dir), samples(run_dir)
    back = command(
        corpus, "run.name=a", "checkpoint.load_step=20", "checkpoint.exclude_from_loading=[data_loader]",
        "checkpoint.interval=5",
    )  # fmt: skip
    process = start(back, tmp_path)
    wait_until(lambda: (run_dir / "checkpoint/step-35").exists() and len(record(run_dir)["lineages"]) == 2)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    code, out = regrow(back, tmp_path)
    assert code == 0, out
    history = record(run_dir)
    assert len(history["lineages"]) == 2
    assert history["attempts"][1]["from_step"] == 20
    assert history["attempts"][2]["from_step"] >= 35
    assert curve(run_dir)[:20] == before[:20]
    # The order began anew at 20 and was not begun anew by the second start.
    assert [r["ids"] for r in samples(run_dir)][20:] == [r["ids"] for r in order][:20]


SHARDED = ["parallel.dp_shard=2"]


@pytest.mark.parametrize(
    ("number", "degrees"),
    [
        (signal.SIGTERM, []),
        (signal.SIGUSR2, []),
        (signal.SIGINT, []),
        (signal.SIGINT, SHARDED),
        (signal.SIGUSR2, SHARDED),
    ],
)
def test_a_signal_saves_stops_and_resumes(
    corpus: Path, tmp_path: Path, number: signal.Signals, degrees: list[str]
) -> None:
    arguments = command(corpus, *degrees, "run.name=a", "train.steps=400", "checkpoint.interval=1000")
    run_dir = tmp_path / "outputs" / "a"
    process = start(arguments, tmp_path)
    wait_until(lambda: len(metrics(run_dir)) >= 3)
    process.send_signal(number)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 3, out
    attempt = record(run_dir)["attempts"][-1]
    assert attempt["end"] == ("preempted" if number == signal.SIGUSR2 else "terminated")
    reached = len(metrics(run_dir))
    assert attempt["to_step"] == reached < 400
    assert (run_dir / f"checkpoint/step-{reached}").exists()
    more = [a for a in arguments if "train.steps" not in a]
    code, out = regrow([*more, f"train.steps={reached + 2}"], tmp_path)
    assert code == 0, out
    assert record(run_dir)["attempts"][-1]["from_step"] == reached


def test_ranks_restart_here_and_resume(corpus: Path, tmp_path: Path) -> None:
    arguments = command(corpus, "parallel.dp_shard=2", "launch.max_restarts=2", "run.name=a")
    run_dir = tmp_path / "outputs" / "a"
    process = start(arguments, tmp_path)
    wait_until(lambda: (run_dir / "checkpoint/step-10").exists())
    workers(process.pid)[1].kill()
    out, _ = process.communicate(timeout=90)
    assert process.returncode == 0, out
    assert [r["step"] for r in metrics(run_dir)] == list(range(1, 41))
    assert [a["from_step"] for a in record(run_dir)["attempts"]][1] >= 10


def test_a_dead_rank_stops_the_others_and_is_named(corpus: Path, tmp_path: Path) -> None:
    process = start(command(corpus, "parallel.dp_shard=2", "run.name=a", "train.steps=4000"), tmp_path)
    wait_until(lambda: len(metrics(tmp_path / "outputs/a")) >= 2)
    workers(process.pid)[1].kill()
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "rank 1 died (signal SIGKILL)" in out


def test_a_second_launcher_is_refused(corpus: Path, tmp_path: Path) -> None:
    arguments = command(corpus, "run.name=a", "train.steps=4000")
    process = start(arguments, tmp_path)
    wait_until(lambda: len(metrics(tmp_path / "outputs/a")) >= 2)
    code, out = regrow(arguments, tmp_path)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert code == 2
    assert f"is held by process {process.pid}" in out


def test_ranks_from_torchrun_are_used(corpus: Path, tmp_path: Path) -> None:
    arguments = command(corpus, "parallel=fsdp", "run.name=a", "train.steps=4", "hooks=none")
    whole = command(corpus, "parallel.dp_shard=2", "run.name=b", "train.steps=4", "hooks=none")
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:0",
    ]
    import sys

    done = subprocess.run(
        [sys.executable, *torchrun, "--local-addr=127.0.0.1", "-m", "regrow.launch.train", *arguments],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    code, out = regrow(whole, tmp_path)
    assert code == 0, out
    assert curve(tmp_path / "outputs/a") == curve(tmp_path / "outputs/b")
