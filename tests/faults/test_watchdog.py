"""Steps that hang, on real ranks: named, with the stacks of all, ended, and computed again to the same losses."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from regrow.checkpoint.processes import process_stat
from tests import support
from tests.faults.hook_package import write_hook
from tests.faults.test_kills import command, workers
from tests.support import curve, metrics, record, wait_until
from tests.warm import regrow

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

WATCHED = [
    "+hook@hooks.watchdog=watchdog", "hooks.watchdog.min_s=2", "hooks.watchdog.warmup=2",
    "hooks.watchdog.abort_after_s=8",
]  # fmt: skip
RANKS = ["parallel.dp_shard=2", "hooks.sample.enabled=false"]


def report_of(run_dir: Path) -> tuple[Path, dict[str, Any]]:
    (found,) = (run_dir / "watchdog").glob("step-*/report.json")
    body: dict[str, Any] = json.loads(found.read_text())
    return found.parent, body


def test_a_stopped_rank_is_named_and_the_run_goes_on_by_itself(corpus: Path, tmp_path: Path) -> None:
    code, out = regrow(command(corpus, *RANKS, "run.name=whole"), tmp_path)
    assert code == 0, out
    run_dir = tmp_path / "outputs/cut"
    # By interpreters: of a fork that is stopped the launcher hears otherwise.
    arguments = command(corpus, *RANKS, *WATCHED, "launch.max_restarts=1", "run.name=cut")
    process = support.start(arguments, tmp_path)
    # How long two ranks take to start is not what is measured.
    wait_until(lambda: (run_dir / "checkpoint/step-10").exists() and len(metrics(run_dir)) >= 12, timeout_s=180.0)
    victim = workers(process.pid)[1]
    os.kill(victim.pid, signal.SIGSTOP)
    stopped = time.monotonic()
    out, _ = process.communicate(timeout=60)
    seconds = time.monotonic() - stopped
    assert process.returncode == 0, out
    assert seconds < 60
    folder, report = report_of(run_dir)
    assert report["missing"] == [1], report
    assert f"rank 1 (process {victim.pid} on" in report["sentence"]
    assert "does not answer; it is stopped by a signal" in report["sentence"]
    assert report["ranks"][1]["phase"] not in ("a phase that is not known", "outside of the steps"), report
    assert "rank 0 waits in" in report["sentence"]
    assert report["sentence"] in out
    for rank in (0, 1):
        stacks = (folder / f"rank-{rank}.stacks.txt").read_text()
        assert "main thread:" in stacks
        assert "trainer/loop.py" in stacks, stacks
    # It ended by SIGKILL, since nothing else reaches it.
    assert process_stat(victim.pid)[0] in ("", "Z")
    assert [r["step"] for r in metrics(run_dir)] == list(range(1, 41))
    assert curve(run_dir) == curve(tmp_path / "outputs/whole")
    assert len(record(run_dir)["attempts"]) == 2
    assert not list((run_dir / "watchdog").glob("live-*"))


def test_a_rank_that_hangs_by_itself_is_told_from_those_that_wait(corpus: Path, tmp_path: Path) -> None:
    """Without restarts the sentence is the last thing that the command says."""
    act = "trainer.engine.forward_backward = lambda *given: threading.Event().wait()"
    write_hook(tmp_path, "hanging", step=8, rank=1, act=act)
    code, out = regrow(command(corpus, *RANKS, *WATCHED, "+hook@hooks.bad=bad", "run.name=a"), tmp_path)
    assert code == 1, out
    _, report = report_of(tmp_path / "outputs/a")
    assert report["missing"] == [1], report
    assert report["step"] == 9
    assert report["ranks"][1]["answers"]
    assert report["ranks"][1]["phase"] == "forward and backward"
    assert report["ranks"][0]["collective"], report
    last = out.strip().splitlines()[-1]
    assert last.startswith("error: rank 1: step 9 hangs")
    assert "is missing, in forward and backward" in last


def test_what_may_take_long_is_no_hanging_step(corpus: Path, tmp_path: Path) -> None:
    """Rank 0 is in a hook for longer than a step may take, and the other rank waits for it."""
    write_hook(tmp_path, "slow", step=8, rank=0, act="threading.Event().wait(6.0)")
    watched = [*WATCHED, "+hook@hooks.bad=bad", "run.name=a", "train.steps=12"]
    code, out = regrow(command(corpus, *RANKS, *watched), tmp_path)
    assert code == 0, out
    assert not list((tmp_path / "outputs/a/watchdog").glob("step-*"))
