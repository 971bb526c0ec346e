"""The engine for anybody's loop: what is saved comes back, on other ranks too, and nothing unsound is used."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from regrow.checkpoint import Checkpointer, CheckpointerOptions, join_state, split_state
from regrow.checkpoint.config import KeepEveryNConfig
from regrow.checkpoint.errors import CheckpointError, DamagedStepError, LastSaveError, StepNotFoundError
from regrow.checkpoint.policy.retention import KeepEveryN
from regrow.checkpoint.run.catalog import Catalog
from regrow.checkpoint.run.lease import LeaseHeldError
from tests.pool import run_distributed

MODES = ("sync", "async", "pinned")


def at(step: int) -> dict[str, torch.Tensor]:
    return {"model.w": torch.full((6, 4), float(step)), "optimizer.step": torch.tensor(step)}


def zeros() -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(t) for name, t in at(0).items()}


def save(folder: Path, *steps: int, **options: Any) -> None:
    with Checkpointer(folder, "sync", options=CheckpointerOptions(**options)) as checkpointer:
        checkpointer.load(zeros())
        for step in steps:
            checkpointer.save(step, at(step), {"samples": step * 8})


def save_and_wait(checkpointer: Checkpointer, step: int) -> None:
    checkpointer.save(step, at(step), {"samples": step * 8})
    assert checkpointer.step == step
    checkpointer.wait()


def newest(folder: Path) -> int:
    tensors = zeros()
    with Checkpointer(folder, options=CheckpointerOptions(read_only=True)) as checkpointer:
        state = checkpointer.load(tensors)
    assert state is not None
    step = checkpointer.step
    assert step is not None
    assert state == {"samples": step * 8}
    assert all(torch.equal(tensors[name], t) for name, t in at(step).items())
    return step


def damage(folder: Path, step: int) -> None:
    file = folder / f"step-{step}/__0_0.distcp"
    body = bytearray(file.read_bytes())
    body[body.index(torch.tensor(float(step)).numpy().tobytes() * 4)] ^= 1
    file.write_bytes(body)


@pytest.mark.parametrize("mode", MODES)
def test_what_was_saved_comes_back(tmp_path: Path, mode: Any) -> None:
    tensors = at(0)
    with Checkpointer(tmp_path, mode) as checkpointer:
        assert checkpointer.load(zeros()) is None
        assert checkpointer.steps() == []
        for step in (1, 2, 3):
            checkpointer.wait_staged()
            for tensor in tensors.values():
                tensor.fill_(step)
            checkpointer.save(step, tensors, {"samples": step * 8}, metrics={"val_loss": 1.0 / step})
    assert newest(tmp_path) == 3
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.steps() == [1, 2, 3]
        assert checkpointer.verify(2) == []
        loaded = {"model.w": torch.zeros(6, 4)}
        assert checkpointer.load(loaded, step=2) == {"samples": 16}
        assert loaded["model.w"].eq(2).all()


def test_a_damaged_step_is_passed_over_and_set_aside(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3)
    damage(tmp_path, 3)
    with Checkpointer(tmp_path) as checkpointer:
        assert "model.w" in checkpointer.verify(3)[0]
        with pytest.raises(DamagedStepError, match="model.w"):
            checkpointer.load(zeros(), step=3)
        assert checkpointer.load(zeros()) == {"samples": 16}
        assert checkpointer.step == 2
        checkpointer.save(3, at(3), {"samples": 24})
    assert newest(tmp_path) == 3
    assert (tmp_path / "set-aside/damaged/step-3").is_dir()


def test_nothing_sound_is_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    save(tmp_path, 1)
    damage(tmp_path, 1)
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(CheckpointError, match="must hold a sound step, but 1 cannot be used"):
            checkpointer.load(zeros())
        with pytest.raises(CheckpointError, match="because it holds step 1; call load first"):
            checkpointer.save(1, at(1))


def test_steps_behind_an_older_one_are_another_line(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3)
    with Checkpointer(tmp_path, "sync") as checkpointer:
        with pytest.raises(StepNotFoundError, match=r"step must be one of the steps in .* \(1, 2, 3\), but is 7"):
            checkpointer.load(zeros(), step=7)
        checkpointer.load(zeros(), step=1)
        assert checkpointer.steps() == [1, 2, 3], "nothing is moved before something is saved"
        checkpointer.save(2, at(2), {"samples": 16})
        assert checkpointer.steps() == [1, 2]
        checkpointer.save(3, at(3), {"samples": 24})
        assert checkpointer.load(zeros(), step=1) == {"samples": 8}
        checkpointer.save(2, at(2), {"samples": 16})
        assert checkpointer.steps() == [1, 2]
    save(tmp_path, 3)
    assert newest(tmp_path) == 3
    assert len(list(tmp_path.glob("set-aside/*/step-*"))) == 4


def test_retention_keeps_the_newest_pinned_and_protected(tmp_path: Path) -> None:
    with Checkpointer(
        tmp_path,
        "sync",
        options=CheckpointerOptions(keep_latest_k=2, rules=[KeepEveryN(KeepEveryNConfig(n=4))]),
    ) as checkpointer:
        for step in range(1, 9):
            checkpointer.save(step, at(step), {"samples": step * 8})
            if step == 2:
                checkpointer.pin(2)
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.steps() == [2, 4, 7, 8]


@pytest.mark.slow
def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    script = (
        "import sys, time, torch\n"
        "from regrow.checkpoint import Checkpointer\n"
        "checkpointer = Checkpointer(sys.argv[1], 'sync')\n"
        "checkpointer.save(1, {'model.w': torch.ones(6, 4), 'optimizer.step': torch.tensor(1)}, {'samples': 8})\n"
        "print('saved', flush=True)\n"
        "time.sleep(600)\n"
    )
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"saved\n"
        try:
            with pytest.raises(LeaseHeldError, match=f"is held by process {process.pid} .* choose another folder"):
                Checkpointer(tmp_path)
            assert newest(tmp_path) == 1, "reading needs no lease"
            (tmp_path / "step-2.partial-0badc0de").mkdir()
        finally:
            process.send_signal(signal.SIGKILL)
    save(tmp_path, 2)
    assert newest(tmp_path) == 2
    assert not list(tmp_path.glob("*.partial-*"))


def test_what_cannot_be_saved_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mode must be one of sync, async, pinned, but is 'fast'"):
        Checkpointer(tmp_path, "fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="keep_latest_k must be at least 0, but is -1"):
        CheckpointerOptions(keep_latest_k=-1)
    with Checkpointer(tmp_path, "sync") as checkpointer:
        with pytest.raises(ValueError, match="state must hold what JSON can, but does not"):
            checkpointer.save(1, at(1), {"rng": torch.zeros(3)})
        with pytest.raises(ValueError, match="tensors must map names of one line to tensors, but 'lr' does not"):
            checkpointer.save(1, {"lr": 0.1})  # type: ignore[dict-item]
        checkpointer.save(1, at(1))
        with pytest.raises(ValueError, match=r"step must be above the last step \(1\), but is 1"):
            checkpointer.save(1, at(1))
        with pytest.raises(ValueError, match="step must be a number or 'newest', but is 'last'"):
            checkpointer.load(zeros(), step="last")  # type: ignore[arg-type]
        with pytest.raises(CheckpointError, match="must hold model.b"):
            checkpointer.load({"model.b": torch.zeros(1)})
    with (
        Checkpointer(tmp_path, options=CheckpointerOptions(read_only=True)) as reader,
        pytest.raises(ValueError, match="read_only"),
    ):
        reader.save(2, at(2))


@pytest.mark.parametrize("mode", ["async", "pinned"])
def test_a_state_is_saved_as_it_was_in_the_call(tmp_path: Path, mode: Any) -> None:
    state: dict[str, Any] = {"seen": [1, 2], "nested": {"epoch": 1}}
    metrics = {"loss": 0.5}
    with Checkpointer(tmp_path, mode) as checkpointer:
        checkpointer.save(1, at(1))
        saver, changed = checkpointer._saver, threading.Event()
        assert saver is not None
        # The next save is written when all has changed.
        saver._thread.submit(changed.wait)
        checkpointer.save(2, at(2), state, metrics=metrics)
        state["seen"].append(3)
        state["nested"]["epoch"] = 2
        metrics["loss"] = 9.0
        changed.set()
        assert checkpointer.load(zeros()) == {"seen": [1, 2], "nested": {"epoch": 1}}
    assert Catalog(tmp_path).open(2).manifest.metrics == {"loss": 0.5}


def test_numbers_of_numpy_and_torch_are_numbers(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, "sync") as checkpointer:
        checkpointer.save(np.int64(1), at(1), metrics={"loss": torch.tensor(0.5), "accuracy": np.float32(0.25)})
        checkpointer.save(torch.tensor(2), at(2))
        assert checkpointer.load(zeros(), np.int64(1)) == {}
        assert checkpointer.step == 1
        assert type(checkpointer.step) is int
    assert Catalog(tmp_path).open(1).manifest.metrics == {"loss": 0.5, "accuracy": 0.25}


WRONG: dict[str, tuple[Any, dict[Any, Any], str]] = {
    "a fraction": (1.5, {}, r"step must be a whole number, but is 1\.5; count steps with int"),
    "a text": ("1", {}, "step must be a whole number, but is '1'"),
    "a tensor of two": (
        1,
        {"loss": torch.ones(2)},
        r"metrics must be numbers, but loss is a Tensor that float\(\) does",
    ),
    "no number": (1, {"loss": None}, "metrics must be numbers, but loss is a NoneType"),
    "no name": (1, {3: 0.5}, "metrics must be named by text, but one is named 3"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_steps_and_metrics_are_refused_in_the_call(tmp_path: Path, case: str) -> None:
    step, metrics, message = WRONG[case]
    with Checkpointer(tmp_path, "async") as checkpointer:
        with pytest.raises(ValueError, match=message):
            checkpointer.save(step, at(1), metrics=metrics)
        checkpointer.save(1, at(1))


def test_a_tensor_without_memory_is_not_loaded_in_silence(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(CheckpointError, match=r"model\.w must have memory .* to_empty"):
            checkpointer.load({"model.w": torch.empty(6, 4, device="meta")})
        assert checkpointer.load(zeros()) == {"samples": 8}


def test_a_failed_save_is_an_error_at_the_end_at_the_latest(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, "async")
    checkpointer.save(1, at(1))
    checkpointer.wait()
    # Somebody else's folder has the name.
    (tmp_path / "step-2/something").mkdir(parents=True)
    checkpointer.save(2, at(2))
    with pytest.raises(LastSaveError, match="step 2 must be saved, but was not"):
        checkpointer.close()
    Checkpointer(tmp_path).close()


@pytest.mark.parametrize("mode", MODES)
def test_a_step_whose_save_failed_can_be_saved_again(tmp_path: Path, mode: Any) -> None:
    with Checkpointer(tmp_path, mode) as checkpointer:
        checkpointer.save(1, at(1), {"samples": 8})
        (tmp_path / "step-2/something").mkdir(parents=True)
        with pytest.raises(CheckpointError, match="step 2 must be saved, but was not"):
            save_and_wait(checkpointer, 2)
        assert checkpointer.step == 1
        shutil.rmtree(tmp_path / "step-2")
        save_and_wait(checkpointer, 2)
    assert newest(tmp_path) == 2


def test_tensors_without_a_place_in_the_state_are_not_dropped(tmp_path: Path) -> None:
    nested = {
        "model": {"w": torch.ones(2), "none": torch.zeros(0, 3, dtype=torch.bfloat16)},
        "seen": [1, (torch.tensor(2),)],
    }
    with Checkpointer(tmp_path, "sync") as checkpointer:
        checkpointer.save(1, at(1), {"samples": 8})
        with pytest.raises(
            CheckpointError, match=r"step-1 must hold a nested state .* but model\.w is not .* with load"
        ):
            checkpointer.load_state()
        assert checkpointer.load(zeros()) == {"samples": 8}
        checkpointer.save_state(2, nested)
        assert same(checkpointer.load_state(), nested)
        checkpointer.save(3, *split_state(nested))
        assert same(checkpointer.load_state(), nested)
        checkpointer.save(4, {}, {"samples": 32})
        assert checkpointer.load_state() == {"samples": 32}


def test_tensors_without_elements_come_back(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, "sync") as checkpointer:
        checkpointer.save(1, {"w": torch.ones(2), "none": torch.zeros(0, 3)})
        loaded = {"w": torch.zeros(2), "none": torch.zeros(0, 3)}
        assert checkpointer.load(loaded) == {}
        assert loaded["w"].eq(1).all()
        with pytest.raises(CheckpointError, match="must hold none, but does not"):
            checkpointer.load({"none": torch.zeros(1, 3)})


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.integers(0, 9).map(torch.tensor),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a)


@settings(deadline=None)
@given(st.dictionaries(st.text(min_size=1), VALUES, max_size=4))
def test_a_nested_state_is_joined_as_it_was(state: dict[str, Any]) -> None:
    try:
        tensors, plain = split_state(state)
    except ValueError as error:
        assert "name of its own" in str(error)
        return
    assert same(join_state(plain, tensors), state)


def sharded(folder: Path, step: int | None) -> tuple[list[int], bool]:
    """Loads what is there into shards of this number of ranks, and saves another step where one is given."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = distribute_tensor(torch.zeros(7, 3), mesh, [Shard(0)])
    tensors: dict[str, torch.Tensor] = {"w": weight, "count": torch.tensor(0)}
    with Checkpointer(folder, "async") as checkpointer:
        state = checkpointer.load(tensors)
        found = checkpointer.step or 0
        expected = torch.arange(21.0).view(7, 3) + found
        sound = state is None or (
            state == {"seen": found}
            and torch.equal(weight.full_tensor(), expected)
            and int(tensors["count"]) == found
        )
        if step is not None:
            assert isinstance(weight, DTensor)
            new = distribute_tensor(torch.arange(21.0).view(7, 3) + step, mesh, [Shard(0)])
            checkpointer.save(step, {"w": new, "count": torch.tensor(step)}, {"seen": step})
            checkpointer.wait()
        result = (checkpointer.steps(), sound)
    dist.destroy_process_group()
    return result


def refused_on_one(folder: Path) -> list[str]:
    """What one rank cannot save, it refuses on all; then all go on."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = []
    with Checkpointer(folder, "async") as checkpointer:
        wrong: list[tuple[int, dict[str, Any], dict[str, Any]]] = [
            (1, {"w": 1.0}, {}),
            (1, at(1), {"loss": None}),
            (-1, at(1), {}),
        ]
        for step, tensors, metrics in wrong if rank == 1 else [(1, at(1), {})] * 3:
            with pytest.raises(ValueError) as caught:
                checkpointer.save(step, tensors, metrics=metrics)
            found.append(str(caught.value))
        # The first rank's state counts, the others' is not looked at.
        checkpointer.save(1, at(1), {"seen": 1} if rank == 0 else {"seen": torch.ones(1)})
        found.append(str(checkpointer.load(zeros())))
    dist.destroy_process_group()
    return found


@pytest.mark.slow
def test_what_one_rank_refuses_is_refused_on_all(tmp_path: Path) -> None:
    first, second = run_distributed(refused_on_one, tmp_path, world_size=2)
    assert first == second
    assert ["'w' does not" in first[0], "loss is a NoneType" in first[1], "but is -1" in first[2]] == [True] * 3
    assert first[3] == "{'seen': 1}"


class LoopError(Exception):
    """What ends a loop."""


def end_with_an_error(folder: Path) -> None:
    """The loop ends while step 2 is saved, of which rank 1, if there is one, writes no part: it is killed."""
    with Checkpointer(folder, "async") as checkpointer:
        checkpointer.save(1, at(1), {"samples": 8})
        checkpointer.wait()
        is_killed = dist.is_initialized() and dist.get_rank() == 1
        if is_killed:
            assert checkpointer._saver is not None
            checkpointer._saver._thread.submit(threading.Event().wait)
        checkpointer.save(2, at(2), {"samples": 16})
        if is_killed:
            os._exit(0)
        raise LoopError


def test_an_error_lets_the_save_in_flight_end(tmp_path: Path) -> None:
    with pytest.raises(LoopError):
        end_with_an_error(tmp_path)
    assert newest(tmp_path) == 2
    Checkpointer(tmp_path).close()


def end_beside_a_killed_rank(folder: Path) -> None:
    dist.init_process_group("gloo")
    began = time.monotonic()
    with pytest.raises(LoopError):
        end_with_an_error(folder)
    assert time.monotonic() - began < 45, "the ranks' time-out is 600 s"


@pytest.mark.slow
def test_an_error_does_not_wait_for_a_killed_rank(tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as caught:
        run_distributed(end_beside_a_killed_rank, tmp_path, world_size=2)
    assert str(caught.value) == "rank 1: died without an answer, exit code 0"
    assert newest(tmp_path) == 1


def open_unlistable(folder: Path) -> tuple[str, bool]:
    """Opens a folder that rank 0 can write its lease into, but not look through; then once more."""
    dist.init_process_group("gloo")

    def fail(catalog: Catalog) -> list[str]:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Catalog, "clear_leftovers", fail)
        with pytest.raises(CheckpointError) as caught:
            Checkpointer(folder)
    beats = any(thread.name == "lease" for thread in threading.enumerate())
    Checkpointer(folder).close()
    dist.destroy_process_group()
    return str(caught.value), beats


def test_a_folder_that_cannot_be_looked_through_is_let_go_on_all_ranks(tmp_path: Path) -> None:
    for message, beats in run_distributed(open_unlistable, tmp_path, world_size=2):
        assert message.startswith("folder must be one that can be listed, but ")
        assert "Input/output error" in message
        assert not beats


@pytest.mark.slow
def test_ranks_reshard_and_fall_back_together(tmp_path: Path) -> None:
    assert run_distributed(sharded, tmp_path, 1, world_size=2) == [([1], True)] * 2
    assert run_distributed(sharded, tmp_path, 2, world_size=3) == [([1, 2], True)] * 3
    # Damage that the rank which reads that file alone can see.
    file = tmp_path / "step-2/__2_0.distcp"
    body = bytearray(file.read_bytes())
    body[body.index((torch.arange(21.0)[18:] + 2).numpy().tobytes())] ^= 1
    file.write_bytes(body)
    assert run_distributed(sharded, tmp_path, 2, world_size=3) == [([1, 2], True)] * 3
    assert (tmp_path / "set-aside/damaged/step-2").is_dir()
    assert run_distributed(sharded, tmp_path, None, world_size=1) == [([1, 2], True)]


def test_config_modules_do_not_load_torch() -> None:
    code = "import sys, regrow.checkpoint.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
