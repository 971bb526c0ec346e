"""`regrow-eval --watch` beside a run that keeps only its newest step: none is missed, each result comes once."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import record, tiny, wait_until
from tests.warm import Command, kill_all, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

SAVES = 10


def watcher(run_dir: Path, *tasks: Path) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-P",
        "-m",
        "regrow.launch.commands.evaluate",
        str(run_dir),
        "--tasks",
        *map(str, tasks),
    ]
    return subprocess.Popen(
        [*command, "--watch", "--device", "cpu"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def rows(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "evaluations.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def run(corpus: Path, tmp_path: Path) -> Command:
    """A run with a save in six seconds or so."""
    return start(
        tiny(corpus, f"train.steps={SAVES * 2}", "checkpoint.interval=2", "checkpoint.keep_latest_k=1", "hooks=none",
             "+hook@hooks.throttle=throttle", "hooks.throttle.seconds=3", "run.name=a", "launch.device=cpu"), tmp_path,
    )  # fmt: skip


def test_no_step_is_missed_and_each_result_comes_once(run: Command, tmp_path: Path) -> None:
    """The watcher is killed three times, each time between the two tasks of a step, or soon after."""
    tasks = tmp_path / "texts.jsonl"
    tasks.write_text('{"text": "a text, and another"}\n')
    more = tmp_path / "words.jsonl"
    more.write_text('{"cloze": "one word after another"}\n')
    run_dir = tmp_path / "outputs/a"
    wait_until(lambda: (run_dir / "config.yaml").exists())
    try:
        for count in (1, 5, 9):
            watching = watcher(run_dir, tasks, more)
            wait_until(lambda: len(rows(run_dir)) >= count, 120.0, 0.05)  # noqa: B023
            os.killpg(watching.pid, signal.SIGKILL)
            watching.communicate()
        last = watcher(run_dir, tasks, more)
        out, err = last.communicate(timeout=200)
        assert last.returncode == 0, err
        run.wait(60)
        assert run.returncode == 0
    finally:
        kill_all()
    assert record(run_dir)["attempts"][-1]["end"] == "finished"
    found = [(row["step"], row["task"]) for row in rows(run_dir)]
    steps = range(2, SAVES * 2 + 1, 2)
    assert sorted(found) == [(step, task) for step in steps for task in ("texts", "words")]
    # A line for each step that it saw; those before are in the record alone.
    assert {json.loads(line)["step"] for line in out.splitlines()} <= set(steps)
    assert (run_dir / f"checkpoint/step-{SAVES * 2}/manifest.json").exists()


def test_what_is_not_a_run_is_refused(tmp_path: Path) -> None:
    tasks = tmp_path / "texts.jsonl"
    tasks.write_text('{"text": "a text"}\n')
    watching = watcher(tmp_path, tasks)
    _, err = watching.communicate(timeout=60)
    assert watching.returncode == 2
    assert err.splitlines()[-1] == (
        f"error: --watch must be given one run's directory, but {tmp_path} is none; give outputs/NAME"
    )
