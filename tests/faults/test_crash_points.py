"""A save killed at every one of its file operations, on either rank: what is there afterwards is a sound step."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from checkpoint.catalog import Catalog
from checkpoint.config import AsyncMode
from checkpoint.lineage import Lineage
from checkpoint.loading import read_items
from checkpoint.manifest import Manifest
from checkpoint.reader import read_tensors
from checkpoint.saver import StepSaver
from tests.pool import run_distributed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LINE = [Lineage(id="a")]
_AUDITED = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}


def kill_at(count: int) -> list[str]:
    """From now on, kills this process before its `count`-th operation that changes a file; returns those seen."""
    seen: list[str] = []

    def meet(what: str) -> None:
        seen.append(what)
        if len(seen) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event in _AUDITED:
            meet(event)
        elif event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR):
            meet(f"open {args[0]}")

    # Writes and flushes raise no audit event; all of ours go through these.
    for name in ("pwrite", "fsync", "write"):
        real = getattr(os, name)

        def wrapped(*args: Any, real: Any = real, name: str = name) -> Any:
            meet(name)
            return real(*args)

        setattr(os, name, wrapped)
    sys.addaudithook(audit)
    return seen


def make(value: float, ranks: int) -> dict[str, torch.Tensor]:
    """Sharded, replicated and plain tensors that all hold `value`."""
    mesh = init_device_mesh("cpu", (ranks,))
    return {
        "sharded": DTensor.from_local(torch.full((3000, 8), value), mesh, [Shard(0)], run_check=False),
        "replicated": DTensor.from_local(torch.full((50,), value), mesh, [Replicate()], run_check=False),
        **{f"plain{i}": torch.full((4,), value) for i in range(4)},
    }


def save_with_a_kill(folder: Path, victim: int, count: int) -> tuple[str | None, int]:
    """Saves step 1 whole, then step 2 with a kill; returns the error that this rank saw, and its operations."""
    dist.init_process_group("gloo")
    group = dist.new_group(backend="gloo")
    assert group is not None
    ranks, rank = dist.get_world_size(), dist.get_rank()
    saver = StepSaver(folder, AsyncMode["disabled"], torch.device("cpu"), group)
    (first,) = saver.begin(make(1.0, ranks), Manifest(step=1, lineage="a"))
    assert first.error is None
    tensors = make(2.0, ranks)
    seen = kill_at(count if rank == victim else -1)
    (second,) = saver.begin(tensors, Manifest(step=2, lineage="a"))
    return second.error, len(seen)


def check(folder: Path) -> list[int]:
    """What the next run finds: every step that is listed loads, and holds its own values alone."""
    catalog = Catalog(folder)
    catalog.tidy(LINE)
    entries = catalog.entries(LINE)
    for entry in entries:
        items = read_items(entry.place, entry.manifest)
        tensors = {i.name: torch.zeros(i.global_shape, dtype=i.torch_dtype) for i in items}
        read_tensors(entry.place, items, tensors)
        assert len(tensors) == 6
        for name, tensor in tensors.items():
            assert bool((tensor == float(entry.step)).all()), name
    assert not [p for p in folder.iterdir() if ".partial" in p.name]
    return [e.step for e in entries]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_kill_at_every_operation(tmp_path: Path, victim: int) -> None:
    outcomes: list[list[int]] = []
    count = 0
    while True:
        count += 1
        assert count < 100
        folder = tmp_path / str(count)
        folder.mkdir()
        try:
            results = run_distributed(save_with_a_kill, folder, victim, count, world_size=2, timeout_s=30.0)
        except AssertionError as error:
            assert "died without a word" in str(error)
            outcomes.append(check(folder))
            assert outcomes[-1] in ([1], [1, 2])
            continue
        # The operations are used up: this save was not killed.
        assert results[victim] == (None, count - 1)
        break
    assert check(folder) == [1, 2]
    # Rank 0 also writes the metadata and the root manifest, renames and flushes.
    assert len(outcomes) >= (16 if victim == 0 else 6)
    if victim == 0:
        assert outcomes[-1] == [1, 2]
    assert outcomes[0] == [1]
