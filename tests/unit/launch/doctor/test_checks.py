"""What the doctor makes of parts that are in order, missing and broken."""

import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from regrow.launch.doctor.disk import check_bandwidth, check_space, check_writing
from regrow.launch.doctor.host import (
    check_clock,
    check_git,
    check_locked_memory,
    check_open_files,
    check_shared_memory,
)
from regrow.launch.doctor.services import check_slurm, check_wandb
from regrow.launch.doctor.verdict import Check, State, Verdict, run_checks


def ok() -> Verdict:
    return Verdict(name="fine", state=State.ok, found="x")


def test_a_check_that_hangs_or_raises_is_broken_and_keeps_no_other() -> None:
    def hangs() -> Verdict:
        threading.Event().wait(5.0)
        return ok()

    def raises() -> Verdict:
        raise PermissionError(13, "Permission denied", "/x")

    checks = [
        Check(name="late", look=hangs, limit_s=0.2), Check(name="fine", look=ok), Check(name="bad", look=raises)
    ]  # fmt: skip
    late, fine, bad = run_checks(checks)
    assert (late.state, late.found) == (State.broken, "no answer within 0.2 s")
    assert fine.state is State.ok
    assert bad.state is State.broken
    assert "/x" in bad.found


@pytest.fixture
def limits() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("limits")
@pytest.mark.parametrize(("soft", "state"), [(200, State.broken), (512, State.warning), (4096, State.ok)])
def test_open_files(soft: int, state: State) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    verdict = check_open_files()
    assert verdict.state is state
    assert bool(verdict.remedy) == (state is not State.ok)


def test_locked_memory_matters_where_there_is_infiniband(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 16, before[1]))
    try:
        assert check_locked_memory(tmp_path / "none").state is State.ok
        (tmp_path / "mlx5_0").mkdir()
        verdict = check_locked_memory(tmp_path)
        assert verdict.state is State.broken
        assert "mlx5_0" in verdict.found
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, before)


def test_shared_memory(tmp_path: Path) -> None:
    assert check_shared_memory(tmp_path / "none").state is State.broken
    assert check_shared_memory().found.startswith("/dev/shm has")


def test_folders(tmp_path: Path) -> None:
    verdict = check_writing("run.root", tmp_path / "a/b", "run.root=FOLDER")
    assert verdict.state is State.ok
    assert "will be made" in verdict.found
    (tmp_path / "file").touch()
    verdict = check_writing("run.root", tmp_path / "file", "run.root=FOLDER")
    assert verdict.state is State.broken
    assert "run.root=FOLDER" in verdict.remedy
    verdict = check_bandwidth(tmp_path)
    assert "MB/s into the page cache" in verdict.found
    assert check_bandwidth(Path("/proc/self")).state is State.broken
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize(
    ("size", "kept", "state"), [(1 << 20, 10, State.ok), (1 << 60, 1, State.broken), (None, 1, State.ok)]
)
def test_space(tmp_path: Path, size: int | None, kept: int, state: State) -> None:
    assert check_space(tmp_path, size, kept).state is state


def test_fewer_checkpoints_than_are_kept_is_a_warning(tmp_path: Path) -> None:
    usage = os.statvfs(tmp_path)
    free = usage.f_bavail * usage.f_frsize
    assert check_space(tmp_path, free // 3, 10).state is State.warning


def program(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


def test_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check_slurm(wanted=False).state is State.absent
    assert check_slurm(wanted=True).state is State.broken
    program(tmp_path, "sinfo", "echo 'gpu* up 4'")
    verdict = check_slurm(wanted=True)
    assert verdict.found == "squeue, sbatch, srun, scontrol, sacct cannot be found"
    for name in ("squeue", "sbatch", "srun", "scontrol", "sacct"):
        program(tmp_path, name, "exit 0")
    assert check_slurm(wanted=True).found == "partitions gpu* (4 nodes, up)"
    program(tmp_path, "sinfo", "echo 'slurm_load_partitions: Unable to contact slurm controller' >&2; exit 1")
    assert check_slurm(wanted=False).state is State.warning
    verdict = check_slurm(wanted=True)
    assert verdict.state is State.broken
    assert "Unable to contact" in verdict.found


def test_clocks_of_several_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = {"SLURM_JOB_ID": "1", "SLURM_NNODES": "2"}
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    program(tmp_path, "srun", "echo 1000.0; echo 1090.0")
    verdict = check_clock(job)
    assert verdict.state is State.warning
    assert "of 2 nodes" in verdict.found
    program(tmp_path, "srun", "echo 1000.0; echo 1000.0")
    assert check_clock(job).state is State.ok
    assert check_clock({}).name == "clock"


@pytest.mark.parametrize(("mode", "state"), [(None, State.ok), ("offline", State.warning), ("online", State.broken)])
def test_wandb_without_a_login(tmp_path: Path, mode: str | None, state: State) -> None:
    assert check_wandb({"HOME": str(tmp_path)}, mode).state is state
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert check_wandb({"HOME": str(tmp_path)}, mode).state is State.ok
    verdict = check_wandb({"HOME": "/", "WANDB_API_KEY": "secret"}, mode)
    assert verdict.state is State.ok
    assert "secret" not in verdict.found


def test_git(tmp_path: Path) -> None:
    assert "is no repository" in check_git(tmp_path).found


def test_the_doctor_itself_needs_no_torch() -> None:
    program = "import sys, regrow.launch.commands.doctor; print({'torch', 'numpy', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
