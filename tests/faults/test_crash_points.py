"""A save that crashes at any of its file operations, on either rank: what is there afterwards is a sound step."""

import fcntl
import itertools
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from regrow.checkpoint.config import AsyncMode
from regrow.checkpoint.format.manifest import Manifest
from regrow.checkpoint.load.reader import read_tensors
from regrow.checkpoint.policy.lineage import Lineage
from regrow.checkpoint.run.catalog import Catalog
from regrow.checkpoint.save.saver import SaverOptions, StepSaver
from tests.pool import run_distributed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LINE = [Lineage(id="a")]
_AUDITED = {"os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}


def count_operations(act: Callable[[], None], at: int) -> list[str]:
    """From now on, calls `act` before this process' `at`-th operation that changes a file; returns those seen."""
    seen: list[str] = []

    def meet(what: str) -> None:
        seen.append(what)
        if len(seen) == at:
            act()

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


def save_with_a_crash(folder: Path, victim: int, at: int, crash: str) -> tuple[str | None, int]:
    """Saves step 1 whole, then step 2 with a crash; returns the error that this rank saw, and its operations.

    Args:
        folder: the checkpoint folder.
        victim: the rank whose operations are counted.
        at: before which of them it happens.
        crash: `one` kills the victim, `both` all ranks, `power` drops what no rank has flushed and kills them.
    """
    dist.init_process_group("gloo")
    group = dist.new_group(backend="gloo")
    assert group is not None
    ranks, rank = dist.get_world_size(), dist.get_rank()
    pids: list[int] = [0] * ranks
    dist.all_gather_object(pids, os.getpid(), group=group)

    def act() -> None:
        if crash == "power":
            lose_power(folder)
        for pid in pids if crash != "one" else []:
            if pid != os.getpid():
                os.kill(pid, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    options = SaverOptions(commit_timeout_s=0.5)
    saver = StepSaver(folder, AsyncMode["disabled"], torch.device("cpu"), group, options)
    (first,) = saver.save(make(1.0, ranks), Manifest(step=1, lineage="a"))
    assert first.error is None
    dist.barrier(group)
    tensors = make(2.0, ranks)
    seen = count_operations(act, at if rank == victim else -1)
    (second,) = saver.save(tensors, Manifest(step=2, lineage="a"))
    return second.error, len(seen)


def lose_power(folder: Path) -> None:
    """Stops the file system as a power cut would: what was not flushed is gone (FS_IOC_SHUTDOWN, no log flush)."""
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.ioctl(descriptor, 0x8004587D, struct.pack("I", 2))


@contextmanager
def ext4(place: Path) -> Iterator[Path]:
    """A file system of its own in memory, which hides no missing flush; yields its mount point."""
    image, mount = place / "image", place / "mount"
    mount.mkdir(parents=True)
    with image.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-J", "size=4", str(image)], check=True)
    mount_image(image, mount)
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=False)


@contextmanager
def after_the_cut(place: Path) -> Iterator[Path]:
    """The file system as it comes up again: a copy of its disk, so that nothing of the old one's memory is met."""
    again = place / "again"
    again.mkdir()
    shutil.copyfile(place / "image", place / "copy")
    mount_image(place / "copy", again)
    try:
        yield again
    finally:
        subprocess.run(["umount", str(again)], check=False)


def mount_image(image: Path, mount: Path) -> None:
    """Mounts an image; the kernel commits nothing by itself within the test's time."""
    options = "loop,noauto_da_alloc,commit=600"
    subprocess.run(["mount", "-o", options, str(image), str(mount)], check=True)


def check(folder: Path) -> list[int]:
    """What the next run finds: every step that is listed loads, and holds its own values alone."""
    catalog = Catalog(folder)
    catalog.clean_up(LINE)
    entries = catalog.entries(LINE)
    for entry in entries:
        items = entry.items()
        tensors = {i.name: torch.zeros(i.global_shape, dtype=i.torch_dtype) for i in items}
        read_tensors(entry.storage, items, tensors)
        assert len(tensors) == 6
        for name, tensor in tensors.items():
            assert bool((tensor == float(entry.step)).all()), name
    assert not [p for p in folder.iterdir() if ".partial" in p.name or ".removing" in p.name]
    return [e.step for e in entries]


def crash_everywhere(victim: int, crash: str, places: Iterator[Path]) -> list[list[int]]:
    """What is found after a crash at the first, second, … operation, until a save is not met any more."""
    outcomes: list[list[int]] = []
    for at, place in enumerate(places, start=1):
        assert at < 100
        with ext4(place) if crash == "power" else nullcontext(place) as folder:
            try:
                results = run_distributed(save_with_a_crash, folder, victim, at, crash, world_size=2, timeout_s=30.0)
            except AssertionError as error:
                assert "died without an answer" in str(error)
                with after_the_cut(place) if crash == "power" else nullcontext(folder) as found:
                    outcomes.append(check(found))
                continue
            # The operations are used up: this save met no crash.
            assert results[victim] == (None, at - 1)
            assert check(folder) == [1, 2]
            return outcomes
    raise AssertionError("unreachable")


@pytest.mark.parametrize("crash", ["one", "both", "power"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_crash_at_every_operation(tmp_path: Path, victim: int, crash: str) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        root = Path(memory) if crash == "power" else tmp_path

        def places() -> Iterator[Path]:
            for n in itertools.count():
                (root / str(n)).mkdir()
                yield root / str(n)

        outcomes = crash_everywhere(victim, crash, places())
    assert all(found in ([1], [1, 2]) for found in outcomes)
    # Rank 0 also writes the metadata and the root manifest, renames and flushes.
    assert len(outcomes) >= (16 if victim == 0 else 6)
    assert outcomes[0] == [1]
    if victim == 0:
        # Only the last flush follows the rename that commits.
        assert outcomes[-2] == [1]
        assert outcomes[-1] == [1] if crash == "power" else outcomes[-1] == [1, 2]


def save_and_lose_power(folder: Path, flushes: bool) -> None:
    """Saves a step, and the power goes the moment that the save has succeeded."""
    if not flushes:
        os.fsync = lambda fd: None
    dist.init_process_group("gloo")
    group = dist.new_group(backend="gloo")
    assert group is not None
    saver = StepSaver(folder, AsyncMode["disabled"], torch.device("cpu"), group)
    (result,) = saver.save(make(1.0, dist.get_world_size()), Manifest(step=1, lineage="a"))
    assert result.error is None
    dist.barrier(group)
    if dist.get_rank() == 0:
        lose_power(folder)


@pytest.mark.parametrize("flushes", [True, False])
def test_a_power_cut_shows_whether_a_save_was_flushed(flushes: bool) -> None:
    """What has succeeded is there afterwards; and the file system here hides no flush that is left out."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory, ext4(Path(memory)) as folder:
        run_distributed(save_and_lose_power, folder, flushes, world_size=2, timeout_s=30.0)
        with after_the_cut(Path(memory)) as found:
            assert check(found) == ([1] if flushes else [])
