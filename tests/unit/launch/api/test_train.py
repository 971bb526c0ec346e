"""A run from Python: as the command trains it, resumed, refused, stopped; and what lies there afterwards."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import regrow
from tests.support import REPO, curve, metrics, record, tiny, wait_until
from tests.support import regrow as command

# No `if __name__ == "__main__"`: that is what scripts and notebooks look like.
SCRIPT = """
import json, sys
import regrow

result = regrow.train(regrow.compose(json.loads(sys.argv[1])))
print("result", result.reason, result.exit_code, result.step)
"""
# In a thread of its own, as a server or a notebook's background task would; and it leaves the environment as it was.
THREAD = """
import json, os, sys, threading
import regrow

before = dict(os.environ)
thread = threading.Thread(target=lambda: print(regrow.train(regrow.compose(json.loads(sys.argv[1])))))
thread.start()
thread.join()
left = {k for k in os.environ if os.environ[k] != before.get(k)}
print("left", sorted(left & {"OMP_NUM_THREADS"}))
"""


def run_of(corpus: Path, folder: Path, *more: str) -> list[str]:
    return tiny(corpus, f"run.root={folder}", "run.name=r", "train.steps=3", "hooks.sample.enabled=false", *more)


@pytest.mark.slow
def test_it_trains_continues_and_says_that_it_is_finished(corpus: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    config = regrow.compose(run_of(corpus, tmp_path, "train.deterministic=true"))
    first = regrow.train(config)
    assert (first.reason, first.exit_code, first.step, first.finished) == ("finished", 0, 3, True)
    assert first.metrics_path == tmp_path / "r/metrics.jsonl"
    assert regrow.read_metrics(first.run_dir).column("step").to_pylist() == [1, 2, 3]
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()
    assert regrow.train(config) == first
    assert len(record(first.run_dir)["attempts"]) == 1
    more = regrow.train(regrow.compose(run_of(corpus, tmp_path, "train.steps=5", "run.extend=hold")))
    assert (more.step, record(more.run_dir)["attempts"][-1]["from_step"]) == (5, 3)
    # A command goes on where Python stopped, and the other way round.
    code, out = command(run_of(corpus, tmp_path, "train.steps=6", "run.extend=hold"), tmp_path)
    assert code == 0, out
    assert [r["step"] for r in metrics(more.run_dir)] == [1, 2, 3, 4, 5, 6]
    assert regrow.runs(tmp_path) == [
        regrow.Run(name="r", path=tmp_path / "r", status="finished", step=6, steps=6),
    ]
    assert regrow.runs(tmp_path)[0].config["train"]["steps"] == 6


@pytest.mark.slow
def test_it_computes_what_the_command_computes(corpus: Path, tmp_path: Path) -> None:
    code, out = command(run_of(corpus, tmp_path / "a"), tmp_path)
    assert code == 0, out
    regrow.train(regrow.compose(run_of(corpus, tmp_path / "b")))
    assert curve(tmp_path / "a/r") == curve(tmp_path / "b/r")


@pytest.mark.slow
def test_bad_input_is_one_sentence(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.vocab_size"):
        regrow.train(regrow.compose(run_of(corpus, tmp_path, "model.vocab_size=3")))
    regrow.train(regrow.compose(run_of(corpus, tmp_path)))
    with pytest.raises(ValueError, match="must keep its hyperparameters"):
        regrow.train(regrow.compose(run_of(corpus, tmp_path, "optimizer.lr=1")))
    with pytest.raises(ValueError, match="step 7|steps in"):
        regrow.train(regrow.compose(run_of(corpus, tmp_path, "checkpoint.load_step=7")))


@pytest.mark.slow
def test_a_failure_is_an_error_with_what_was_reached(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(regrow.TrainingFailedError, match="loss") as caught:
        regrow.train(regrow.compose(run_of(corpus, tmp_path, "optimizer.lr=1e30", "train.steps=9")))
    assert caught.value.result.exit_code == 1
    assert regrow.runs(tmp_path)[0].status == "failed"


@pytest.mark.slow
def test_a_script_trains_on_two_ranks_and_ctrl_c_saves(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    overrides = run_of(corpus, tmp_path, "train.steps=5000", "parallel=fsdp", "parallel.dp_shard=2")
    process = subprocess.Popen(
        [sys.executable, "script.py", json.dumps(overrides)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_until(lambda: len(metrics(tmp_path / "r")) > 5, 120, every_s=0.05)
    assert regrow.runs(tmp_path)[0].status == "running"
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert "result terminated 3" in out, out
    found = regrow.runs(tmp_path)[0]
    assert found.status == "stopped"
    assert found.step == metrics(tmp_path / "r")[-1]["step"]


@pytest.mark.slow
def test_two_ranks_train_from_a_thread_and_leave_the_environment_alone(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(THREAD)
    overrides = run_of(corpus, tmp_path, "train.steps=2", "parallel=fsdp", "parallel.dp_shard=2")
    environ = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "script.py", json.dumps(overrides)],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "reason='finished'" in done.stdout, done.stderr
    assert "left []" in done.stdout


@pytest.mark.slow
def test_ctrl_c_in_process_saves_and_kill_9_is_seen(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    for number, expected in ((signal.SIGINT, "stopped"), (signal.SIGKILL, "killed")):
        rows = len(metrics(tmp_path / "r"))
        process = subprocess.Popen(
            [sys.executable, "script.py", json.dumps(run_of(corpus, tmp_path, "train.steps=5000"))],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        wait_until(lambda rows=rows: len(metrics(tmp_path / "r")) > rows + 5, 120, every_s=0.05)  # type: ignore[misc]
        process.send_signal(number)
        out, _ = process.communicate(timeout=120)
        assert ("result terminated 3" in out) is (number == signal.SIGINT), out
        assert regrow.runs(tmp_path)[0].status == expected


def test_runs_of_a_folder(tmp_path: Path) -> None:
    stored = REPO / "tests/compatibility/run_5d27da2/run"
    shutil.copytree(stored, tmp_path / "sweep/one")
    shutil.copytree(stored, tmp_path / "two")
    (tmp_path / "two/run.json").write_text("{")
    (tmp_path / "else").mkdir()
    one, two = regrow.runs(tmp_path)
    assert (one.name, one.status, one.step, one.config["seed"]) == ("sweep/one", "finished", 8, 0)
    assert (two.name, two.status, two.step) == ("two", "damaged", None)
    (tmp_path / "sweep/one/checkpoint/step-8/manifest.json").unlink()
    assert regrow.runs(tmp_path)[0].step is None
    with pytest.raises(ValueError, match="must be a folder with runs in it"):
        regrow.runs(tmp_path / "nowhere")
