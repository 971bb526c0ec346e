"""The loops of docs/other-trainers.md as they stand there: run, killed in the middle, and run again."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from regrow.checkpoint import Checkpointer, CheckpointerOptions
from tests.pool import run_distributed
from tests.support import REPO

pytestmark = pytest.mark.slow

BLOCKS = {
    match[1]: match[0]
    for match in re.finditer(
        r"# (\w+\.py)\b.*?(?=^```$)", (REPO / "docs/other-trainers.md").read_text(), re.DOTALL | re.MULTILINE
    )
}
LAST = 60


def start(script: Path) -> "subprocess.Popen[bytes]":
    # As a user would: nothing is looked up in a network.
    environ = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, script.name],
        cwd=script.parent,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def script_in(folder: Path, name: str) -> Path:
    folder.mkdir()
    path = folder / name
    path.write_text(BLOCKS[name])
    return path


def finish(script: Path) -> str:
    with start(script) as process:
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out.decode()
    return out.decode()


def kill_after(script: Path, folder: Path, step: int) -> None:
    """SIGKILL as soon as a step is complete."""
    with start(script) as process:
        deadline = time.monotonic() + 120
        while not (folder / f"step-{step}").exists():
            assert process.poll() is None, process.communicate()[0].decode()
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL


def final_state(folder: Path) -> dict[str, Any]:
    with Checkpointer(folder, options=CheckpointerOptions(read_only=True)) as checkpointer:
        state = checkpointer.load_state()
        assert checkpointer.step == LAST
        assert all(checkpointer.verify(step) == [] for step in checkpointer.steps())
    assert state is not None
    return state


def assert_same(a: Any, b: Any, where: str = "state") -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, pair in enumerate(zip(a, b, strict=True)):
            assert_same(pair[0], pair[1], f"{where}.{index}")
    else:
        assert a == b, where


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "callback"])
def test_a_killed_run_ends_like_an_undisturbed_one(tmp_path: Path, name: str) -> None:
    undisturbed = script_in(tmp_path / "undisturbed", f"{name}.py")
    killed = script_in(tmp_path / "killed", f"{name}.py")
    finish(undisturbed)
    folder = killed.parent / f"{name}-checkpoints"
    kill_after(killed, folder, 20)
    with Checkpointer(folder, options=CheckpointerOptions(read_only=True)) as checkpointer:
        reached = checkpointer.steps()[-1]
    assert 20 <= reached < LAST
    finish(killed)
    states = [final_state(s.parent / f"{name}-checkpoints") for s in (undisturbed, killed)]
    for state in states:
        # What the Trainer averages and sums up since its own start.
        for entry in ("log_history", "total_flos"):
            state.get("trainer", {}).pop(entry, None)
    assert_same(states[0], states[1])
    finish(killed)


def _sharded(folder: Path) -> None:
    os.chdir(folder)
    exec(compile(BLOCKS["sharded.py"], "sharded.py", "exec"), {"__entry_": "__main__"})


def test_sharded_state_moves_to_another_number_of_ranks(tmp_path: Path) -> None:
    def weights(step: int) -> dict[str, torch.Tensor]:
        with Checkpointer(
            tmp_path / "sharded-checkpoints", options=CheckpointerOptions(read_only=True)
        ) as checkpointer:
            state = checkpointer.load_state(step)
        assert state is not None
        found: dict[str, torch.Tensor] = state["model"]
        return found

    run_distributed(_sharded, tmp_path, world_size=2)
    two = weights(6)
    # The run on one rank continues from step 3, after which it repeats what the two ranks did.
    (tmp_path / "sharded-checkpoints/step-6").rename(tmp_path / "step-6")
    run_distributed(_sharded, tmp_path, world_size=1)
    for name, tensor in weights(6).items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-5, atol=1e-6)
