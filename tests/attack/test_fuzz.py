"""A seeded part of what `make fuzz` does: no code, no path outside, bounded memory and time, one sentence each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.attack.guard import Guard, GuardError
from tests.pool import run_distributed
from tests.support import REPO

pytestmark = pytest.mark.slow


def test_hostile_input_comes_to_a_sentence_or_a_result() -> None:
    """In a process of its own: the guard watches all that its process does."""
    command = [sys.executable, "-m", "tests.attack.fuzz", "--seed", "7", "--count", "400"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "400 inputs (100 data, 100 foreign, 100 lease, 100 step)" in done.stdout


def _watch_what_must_not_happen(folder: Path) -> None:
    inside, outside = folder / "inside", folder / "outside"
    inside.mkdir()
    guard = Guard(inside, seconds=1.0, memory_bytes=64 << 20)

    def run_code() -> None:
        os.system("true")

    def write_outside() -> None:
        outside.write_text("x")

    def remove_outside() -> None:
        outside.unlink()

    def allocate() -> None:
        bytearray(128 << 20).count(1)

    def wait() -> None:
        while True:
            pass

    for act, words in (
        (run_code, "run_code: os.system"),
        (write_outside, "write_outside: open for writing"),
        (remove_outside, "remove_outside: os.remove"),
        (allocate, "allocate: .* MiB of memory"),
        (wait, "it takes too long"),
    ):
        with pytest.raises(GuardError, match=words), guard.watching(act.__name__):
            act()
    with guard.watching("nothing"):
        (inside / "x").write_text("x")


def test_the_guard_notices_what_it_is_there_for(tmp_path: Path) -> None:
    """In a process of its own too: what other tests leave behind may be given back just when more is taken."""
    run_distributed(_watch_what_must_not_happen, tmp_path, world_size=1)
