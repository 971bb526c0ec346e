"""How much memory saving and loading take beside the state, measured in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import REPO

pytestmark = pytest.mark.slow

MIB = 1 << 20


def measure(tmp_path: Path, what: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.memory", what, "--mib", "256", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("what", "state", "fixed_mib"),
    [("disabled", 0.0, 64), ("async", 1.0, 64), ("async_with_pinned_mem", 1.0, 64), ("load", 0.0, 64)],
)
def test_peak_memory(tmp_path: Path, what: str, state: float, fixed_mib: int) -> None:
    found = measure(tmp_path, what)
    assert found["peak_bytes"] <= state * found["state_bytes"] + fixed_mib * MIB, found


@pytest.mark.parametrize("what", ["growth-disabled", "growth-async_with_pinned_mem"])
def test_a_hundred_saves_take_no_more_memory_than_ten(tmp_path: Path, what: str) -> None:
    found = measure(tmp_path, what)
    assert found["growth_bytes"] <= 4 * MIB, found
