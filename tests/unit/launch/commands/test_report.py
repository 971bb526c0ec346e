"""`regrow-report`: what it writes where, what it refuses, and that it follows a run."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.report.made_runs import make_sweep
from tests.support import wait_until

COMMAND = [sys.executable, "-P", "-m", "regrow.launch.commands.report"]


def report(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False)


def test_a_page_of_a_folder_lies_in_it(tmp_path: Path) -> None:
    make_sweep(tmp_path / "s", runs=2, steps=3)
    done = report("s", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("s/report.html: 2 runs, ")
    first = next(p for p in (tmp_path / "s").iterdir() if p.is_dir())
    done = report(first, "s", "-o", "both.html", cwd=tmp_path)
    assert done.stdout.startswith("both.html: 2 runs, ")
    assert {p.name for p in tmp_path.iterdir()} == {"s", "both.html"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "nowhere must be a run or a folder with runs in it, but is neither; check the path"),
        (["s", "-o", "a/b.html"], "-o must be a file in a folder that is there, but is a/b.html"),
        (["s", "-o", "s"], "-o must be a file in a folder that is there, but is s"),
        (["s", "--every", "0"], "--every must be at least 0.1 seconds, but is 0; use 5"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    make_sweep(tmp_path / "s", runs=1, steps=1)
    done = report(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {sentence}")
    assert done.stderr.count("\n") == 1


def test_it_needs_no_torch() -> None:
    program = "import sys, regrow.launch.commands.report; print([m for m in ('torch', 'numpy', 'pyarrow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_a_page_follows_its_runs(tmp_path: Path) -> None:
    make_sweep(tmp_path / "s", runs=1, steps=2)
    page, log = tmp_path / "page.html", tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [*COMMAND, "s", "-o", "page.html", "--watch", "--every", "0.1"], cwd=tmp_path, stderr=out
        )
    try:
        wait_until(lambda: ": 1 run, " in log.read_text())
        first = page.read_bytes()
        make_sweep(tmp_path / "s/more", runs=1, steps=2)
        wait_until(lambda: ": 2 runs, " in log.read_text())
        assert page.read_bytes() != first
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(60) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
