"""Benchmarks give what they measured, however busy the machine was."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.checkpoint import summary
from benchmarks.pairs import Seconds, Spread, counted, ratios
from tests.support import REPO

POSITIVE = st.floats(1e-6, 1e6)


@given(st.lists(POSITIVE, min_size=1, max_size=30))
def test_a_spread_lies_within_its_values(values: list[float]) -> None:
    spread = Spread.of(values)
    assert min(values) <= spread.low <= spread.median <= spread.high <= max(values)
    assert spread.rounds == len(values)


def test_ratios_are_of_pairs_and_of_cpu_seconds_where_there_are_any() -> None:
    rounds = [{"a": Seconds(2.0 * n, 1.0), "b": Seconds(1.0 * n, 0.0), "c": Seconds(1.0, 4.0)} for n in (1, 10, 100)]
    assert ratios(rounds, "a", "b") == {"wall": Spread(median=2.0, low=2.0, high=2.0, rounds=3)}
    assert ratios(rounds, "a", "c")["cpu"].median == 0.25
    assert ratios(rounds, "a", "absent") == {}


@given(st.lists(st.booleans(), min_size=1))
def test_all_rounds_count_where_fewer_than_three_were_steady(steady: list[bool]) -> None:
    used, number = counted(steady, lambda s: s)
    assert number == sum(steady)
    assert used == ([True] * number if number >= 3 else steady)


@pytest.mark.parametrize("drift", [0.0, 5.0])
def test_a_busy_machine_gives_a_result_too(drift: float) -> None:
    one = {"disabled": Seconds(2.0, 1.0), "direct": Seconds(1.0, 1.0), "drift": Seconds(drift, 0.0)}
    result = summary([one, one, one])
    assert (result["rounds"], result["steady"], result["counted"]) == (3, 0 if drift else 3, 3)
    assert result["ratios"]["save, durable and hashed (disabled) / direct"]["wall"]["median"] == 2.0


@pytest.mark.slow
def test_the_saving_benchmark_ends_with_its_result(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.checkpoint", "--gib", "0.004", "--rounds", "1", "--no-peers"]
    command += ["--compute", "0", "--folder", str(tmp_path), "--json", str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert len(result["each"]) == result["rounds"] == 1
    assert {"wall", "cpu"} <= set(result["ratios"]["lost, async / memcpy"])
    assert result["machine"] in done.stdout
