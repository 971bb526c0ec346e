"""`regrow doctor` on this machine, and on one that is broken in six places at once."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


NAMESPACE = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]


def doctor(arguments: str, cwd: Path, before: str = "", **environ: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Runs it in a mount namespace of its own, after shell commands; returns exit code and verdicts by name."""
    command = f"{before} exec {sys.executable} -P -m regrow doctor --json --limit 150 {arguments}"
    done = subprocess.run(
        [*NAMESPACE, "bash", "-ec", command],
        cwd=cwd,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout, done.stderr
    return done.returncode, {v["name"]: v for v in json.loads(done.stdout)}


def test_nothing_is_broken_here(tmp_path: Path) -> None:
    code, verdicts = doctor("", tmp_path)
    assert code == 0, verdicts
    assert {v["state"] for v in verdicts.values()} <= {"ok", "warning", "absent"}
    assert verdicts["gloo"]["found"].startswith("2 ranks reduce together")
    assert "and a checkpoint has" in verdicts["disk space"]["found"]
    assert all(v["remedy"] for v in verdicts.values() if v["state"] == "warning")
    assert list(tmp_path.iterdir()) == []


def test_what_is_broken_is_named(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    sinfo = tmp_path / "bin/sinfo"
    sinfo.write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2\nexit 1\n")
    for name in ("squeue", "sbatch", "srun", "scontrol", "sacct"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\n")
    for path in (tmp_path / "bin").iterdir():
        path.chmod(0o755)
    for name in ("runs", "home"):
        (tmp_path / name).mkdir()
    before = f"mount -t tmpfs -o ro none {tmp_path}/runs; mount -t tmpfs -o size=8m none /dev/shm; ulimit -n 200;"
    code, verdicts = doctor(
        f"run.root={tmp_path}/runs logger=wandb wandb.mode=online hydra/launcher=slurm",
        tmp_path,
        before,
        PATH=f"{tmp_path}/bin:{os.environ['PATH']}",
        GLOO_SOCKET_IFNAME="no_such0",
        HOME=str(tmp_path / "home"),
        XDG_CACHE_HOME=f"{tmp_path}/home/cache",
    )
    assert code == 1
    told = {
        "run.root": "Read-only file system",
        "open files": "200 at once",
        "gloo": "2 ranks do not meet",
        "shared memory": "of 8 MiB free",
        "W&B": "not logged in",
        "Slurm": "Unable to contact slurm controller",
    }
    for name, words in told.items():
        assert verdicts[name]["state"] == "broken", verdicts[name]
        assert words in verdicts[name]["found"]
        assert verdicts[name]["remedy"]
    assert "GLOO_SOCKET_IFNAME=no_such0" in verdicts["gloo"]["remedy"]
    for name in ("versions", "devices", "cache", "clock", "git"):
        assert verdicts[name]["state"] != "broken", verdicts[name]


def test_bad_overrides_are_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "regrow", "doctor", "run.rot=x"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "run.rot" in done.stderr
