"""Two jobs on one run: the second is refused, waits, or takes over, and the first can then do no harm."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support import assert_same_tensors, curve, metrics, record, tiny, wait_until
from tests.warm import Command, kill_all, regrow, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

STEPS = 400
LEASE_S = 2


@pytest.fixture(scope="module")
def arguments(corpus: Path) -> list[str]:
    """A run that takes some seconds, of many saves."""
    return tiny(
        corpus, f"train.steps={STEPS}", "checkpoint.interval=20", "checkpoint.keep_latest_k=0", "hooks=none",
        "run.name=a", f"checkpoint.lease_timeout_s={LEASE_S}", "model.dim=128", "data.global_batch_size=16",
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("whole")
    code, out = regrow(arguments, place)
    assert code == 0, out
    return place / "outputs/a"


@pytest.fixture(autouse=True)
def no_survivors() -> Iterator[None]:
    """A test that fails must leave no run behind, paused ones included."""
    yield
    kill_all()
    for child in psutil.Process().children(recursive=True):
        if "regrow.launch.train" in " ".join(child.cmdline()):
            child.kill()


def steps_of(run_dir: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in (run_dir / "checkpoint").glob("step-*") if "." not in p.name)


def assert_whole(run_dir: Path, undisturbed: Path) -> None:
    assert curve(run_dir) == curve(undisturbed)
    assert [r["step"] for r in metrics(run_dir)] == list(range(1, STEPS + 1))
    assert_same_tensors(run_dir / f"checkpoint/step-{STEPS}", undisturbed / f"checkpoint/step-{STEPS}")
    assert set(steps_of(run_dir)) >= set(range(20, STEPS + 1, 20))
    assert [p for p in (run_dir / "checkpoint").iterdir() if ".partial" in p.name or ".removing" in p.name] == []


def test_the_second_is_refused_and_takes_over_when_the_first_is_killed(
    arguments: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    first = start(arguments, tmp_path, SLURM_JOB_ID="41")
    run_dir = tmp_path / "outputs/a"
    wait_until(lambda: len(steps_of(run_dir)) >= 2)
    code, out = regrow(arguments, tmp_path)
    assert code == 2
    assert f"is held by process {first.pid} on {os.uname().nodename} (job 41)" in out
    assert first.poll() is None, "the first goes on"
    first.send_signal(signal.SIGKILL)
    first.communicate()
    before = max(steps_of(run_dir))
    code, out = regrow(arguments, tmp_path)
    assert code == 0, out
    assert record(run_dir)["attempts"][-1]["from_step"] >= before
    assert_whole(run_dir, undisturbed)


def test_a_requeue_that_overlaps_its_dying_predecessor_waits(
    arguments: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    first = start(arguments, tmp_path, SLURM_JOB_ID="42", SLURM_RESTART_COUNT="0")
    run_dir = tmp_path / "outputs/a"
    wait_until(lambda: len(steps_of(run_dir)) >= 2)
    second = start(arguments, tmp_path, SLURM_JOB_ID="42", SLURM_RESTART_COUNT="1")
    time.sleep(3.0)
    assert first.poll() is None
    assert second.poll() is None
    first.send_signal(signal.SIGUSR2)
    first.communicate(timeout=60)
    assert first.returncode == 3
    _, _ = second.communicate(timeout=120)
    assert second.returncode == 0
    assert_whole(run_dir, undisturbed)


def _started_elsewhere(arguments: list[str], cwd: Path) -> tuple[subprocess.Popen[str], psutil.Process]:
    """A run in process and host-name spaces of its own, as on another host; also returns its process."""
    command = [sys.executable, "-P", "-m", "regrow.launch.train", *arguments]
    script = "import os, socket, sys; socket.sethostname('elsewhere'); os.execv(sys.argv[1], sys.argv[1:])"
    spaces = ["unshare", "--fork", "--pid", "--uts", "--mount-proc", "--kill-child"]
    outer = subprocess.Popen(
        [*spaces, sys.executable, "-c", script, *command],
        cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    wait_until(lambda: bool(psutil.Process(outer.pid).children()))
    return outer, psutil.Process(outer.pid).children()[0]


def _pause_in_a_save(process: psutil.Process, folder: Path) -> bool:
    if not any(".partial" in p.name for p in folder.iterdir()):
        return False
    process.suspend()
    names = [p.name for p in folder.iterdir()]
    if any(name.startswith(".lease") for name in names) or not any(".partial" in name for name in names):
        process.resume()
        return False
    return True


@pytest.mark.parametrize("where", ["the same host", "another host"])
def test_a_paused_writer_that_goes_on_can_commit_nothing(
    arguments: list[str], undisturbed: Path, tmp_path: Path, where: str
) -> None:
    first: Command | subprocess.Popen[str]
    if where == "another host":
        first, process = _started_elsewhere(arguments, tmp_path)
    else:
        first = start(arguments, tmp_path)
        process = psutil.Process(first.pid)
    run_dir = tmp_path / "outputs/a"
    wait_until(lambda: len(steps_of(run_dir)) >= 2)
    # While it writes a step, so that it has something to rename when it goes on, and not while it writes its lease,
    # which it may end.
    wait_until(lambda: _pause_in_a_save(process, run_dir / "checkpoint"), every_s=0.0001)
    started = time.monotonic()
    code, out = regrow(arguments, tmp_path)
    assert code == 0, out
    assert time.monotonic() - started > LEASE_S
    assert "took" in out
    assert_whole(run_dir, undisturbed)
    before = sorted((p, p.stat().st_mtime_ns) for p in run_dir.rglob("*") if p.is_file() and "logs" not in p.parts)
    process.resume()
    out, _ = first.communicate(timeout=60)
    assert first.returncode not in (0, 3), out
    after = sorted((p, p.stat().st_mtime_ns) for p in run_dir.rglob("*") if p.is_file() and "logs" not in p.parts)
    assert after == before
    assert_whole(run_dir, undisturbed)
    shutil.rmtree(run_dir)
