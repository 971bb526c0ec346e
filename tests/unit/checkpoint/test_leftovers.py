"""What a kill leaves, and who removes it: never what may have an owner."""

import copy
import dataclasses
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from regrow.checkpoint.inspect.maintenance import repair
from regrow.checkpoint.processes import process_tag, tag_is_dead
from regrow.checkpoint.run.catalog import Catalog
from regrow.checkpoint.run.holder import HeartbeatMonitor, this_process
from regrow.checkpoint.run.leftovers import Leftovers
from regrow.checkpoint.run.reader_lock import reading
from regrow.checkpoint.scratch import clear_dead_scratch, scratch_folder, tag_semaphores
from regrow.checkpoint.storage.local import LocalStorage, takes_direct_io
from regrow.launch.config.errors import UserError
from regrow.launch.config.schema import Config
from regrow.launch.run.ownership import own_run
from regrow.launch.run.preflight import check_config
from tests.support import typed_config

# A launcher of ranks, at the moment at which it is killed: it owns the run, reads a step, and shares semaphores.
_VICTIM = """
import multiprocessing, sys, time
from contextlib import ExitStack
from pathlib import Path
from regrow.checkpoint.run.reader_lock import reading
from regrow.checkpoint.scratch import scratch_folder, tag_semaphores
from regrow.checkpoint.storage.local import LocalStorage
from regrow.launch.run.ownership import own_run
from tests.support import typed_config

run_dir = Path(sys.argv[1])
with ExitStack() as held:
    held.enter_context(own_run(typed_config([]), run_dir))
    (run_dir / "run.json").write_text("{}")
    held.enter_context(reading(LocalStorage(run_dir / "checkpoint/step-3")))
    held.enter_context(scratch_folder())
    tag_semaphores()
    semaphore = multiprocessing.get_context("spawn").Lock()
    print("ready", flush=True)
    time.sleep(600)
"""

_SEMAPHORES = Path("/dev/shm")


@pytest.fixture(scope="module")
def config() -> Config:
    """The default one."""
    return typed_config([])


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary directory of its own."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


def semaphores_of(pid: int) -> list[str]:
    return [p.name for p in _SEMAPHORES.iterdir() if re.match(rf"sem\.regrow-[0-9a-f]+-{pid}-", p.name)]


@contextmanager
def victim(run_dir: Path) -> Iterator[subprocess.Popen[str]]:
    """A process group that waits for its end."""
    (run_dir / "checkpoint/step-3").mkdir(parents=True)
    process = subprocess.Popen(
        [sys.executable, "-c", _VICTIM, str(run_dir)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.slow
def test_what_a_killed_launcher_leaves_goes_and_what_a_living_one_has_stays(
    tmp_path: Path, temporary: Path, config: Config
) -> None:
    run_dir = tmp_path / "run"
    with victim(run_dir) as process:
        checkpoints = run_dir / "checkpoint"
        (checkpoints / ".lease-1.json.0badc0de.tmp").touch()
        (checkpoints / "step-3/.reader-1.json.0badc0de.tmp").touch()
        (checkpoints / "step-3/.direct-0badc0de").touch()
        (checkpoints / "step-5.removing-0badc0de").mkdir()
        (run_dir / ".run.json.77.tmp").touch()
        (run_dir / ".mine.tmp").touch()
        (checkpoints / f".lease-1.json.{process_tag()}.00ffee00.tmp").touch()
        (lock,) = (checkpoints / "step-3").glob("reader-*.json")
        before = sorted(p for p in tmp_path.rglob("*"))
        with pytest.raises(UserError, match=f"is held by process {process.pid}"), own_run(config, run_dir):
            raise AssertionError
        assert clear_dead_scratch() == []
        assert sorted(p for p in tmp_path.rglob("*")) == before
        assert len(semaphores_of(process.pid)) == 1
        assert len(list(temporary.iterdir())) == 1
        # Its resource tracker, which would remove the semaphore, goes with it.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert len(semaphores_of(process.pid)) == 1
        with own_run(config, run_dir):
            Catalog(checkpoints).clean_up([])
        assert lock.name not in [p.name for p in tmp_path.rglob("*")]
        # The first is of this process, which lives.
        assert sorted(p.name for p in tmp_path.rglob("*") if "0badc0de" in p.name or p.suffix == ".tmp") == [
            f".lease-1.json.{process_tag()}.00ffee00.tmp",
            ".mine.tmp",
        ]
        assert semaphores_of(process.pid) == []
        assert list(temporary.iterdir()) == []


def test_a_process_is_dead_only_where_that_can_be_seen() -> None:
    mine = process_tag()
    here, pid, started = mine.split("-")
    assert not tag_is_dead(mine)
    assert tag_is_dead(f"{here}-{pid}-{int(started) - 1}"), "the pid was used again"
    assert tag_is_dead(f"{here}-{2**22 - 1}-1")
    other = f"{int(here, 16) ^ 1:08x}"
    assert not tag_is_dead(f"{other}-{2**22 - 1}-1"), "of another boot, host or namespace"
    for odd in ("", "0-0-0", f"{here}-{10**30}-1", f"{here}-0-1", f"{here}--1-1", f"{mine}\n"):
        assert not tag_is_dead(odd)


def test_scratch_of_others_and_of_other_kinds_stays(temporary: Path) -> None:
    here = process_tag().split("-", maxsplit=1)[0]
    dead = f"regrow-{here}-{2**22 - 1}-1-abcdefgh"
    (temporary / "kept").mkdir()
    (temporary / dead).symlink_to(temporary / "kept")
    (temporary / "regrow-abcdefgh").mkdir()
    with scratch_folder() as folder:
        assert folder.parent == temporary
        assert clear_dead_scratch() == []
    assert sorted(p.name for p in temporary.iterdir()) == sorted(["kept", dead, "regrow-abcdefgh"])
    (temporary / dead).unlink()
    (temporary / dead).mkdir()
    (temporary / dead / "spec").touch()
    assert clear_dead_scratch() == [f"removed {temporary / dead}, which a killed process left"]


def test_semaphores_are_named_after_their_process() -> None:
    tag_semaphores()
    lock = multiprocessing.get_context("spawn").Lock()
    assert len(semaphores_of(os.getpid())) >= 1
    assert [n for n in clear_dead_scratch() if f"-{os.getpid()}-" in n] == []
    with lock:
        assert semaphores_of(os.getpid())


def elsewhere() -> bytes:
    me = dataclasses.replace(this_process(), host="elsewhere", boot="another", namespace="pid:[1]")
    return json.dumps(dataclasses.asdict(me)).encode()


def test_a_reader_on_another_host_is_cleared_when_it_has_stood_still(tmp_path: Path) -> None:
    now = [0.0]
    folder = LocalStorage(tmp_path)
    leftovers = Leftovers(folder, HeartbeatMonitor(lambda: now[0]), 60.0)
    place = folder.child("step-3")
    place.make()
    place.write("reader-a.json", elsewhere())
    place.write("reader-b.json", b"not a lock")
    with reading(place):
        assert leftovers.clear() == ["removed step-3/reader-b.json, which a killed process left"]
        now[0] = 59.0
        assert leftovers.clear_dead_readers() == []
        now[0] = 61.0
        assert leftovers.clear_dead_readers() == ["removed step-3/reader-a.json, which a killed process left"]
        assert len(place.names()) == 1, "this process reads"
    assert place.names() == []


def test_a_removal_that_fails_is_tried_again_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "step-5.removing-0badc0de").mkdir()
    (tmp_path / "step-6.partial-0badc0de").mkdir()
    real = LocalStorage.remove

    def fail(self: LocalStorage, name: str) -> None:
        if name.startswith("step-5"):
            raise OSError(16, "Device or resource busy", name)
        real(self, name)

    with monkeypatch.context() as patched:
        patched.setattr(LocalStorage, "remove", fail)
        assert Catalog(tmp_path).clean_up([]) == ["removed the incomplete step-6.partial-0badc0de"]
        assert "the next start tries again" in caplog.text
    assert Catalog(tmp_path).clean_up([]) == ["removed the incomplete step-5.removing-0badc0de"]


def test_a_temporary_file_is_cleared_unless_its_process_lives_here(tmp_path: Path) -> None:
    here, pid, started = process_tag().split("-")
    other = f"{int(here, 16) ^ 1:08x}"
    for tag in (f"{here}-{pid}-{started}", f"{here}-{2**22 - 1}-1", f"{other}-{pid}-{started}"):
        (tmp_path / f".lease-7.json.{tag}.00000000.tmp").touch()
    Leftovers(LocalStorage(tmp_path), HeartbeatMonitor(), 60.0).clear()
    assert [p.name for p in tmp_path.iterdir()] == [f".lease-7.json.{process_tag()}.00000000.tmp"]


def test_repair_clears_too(tmp_path: Path) -> None:
    (tmp_path / "step-3").mkdir()
    (tmp_path / "step-3/.pinned.0badc0de.tmp").touch()
    (tmp_path / ".direct-0badc0de").touch()
    repair(LocalStorage(tmp_path))
    assert [p for p in tmp_path.rglob("*") if "0badc0de" in p.name] == []


def test_the_probe_of_direct_io_leaves_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    real = os.pwrite

    def look(*args: object) -> int:
        seen.append([p.name for p in tmp_path.iterdir()])
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "pwrite", look)
    takes_direct_io(tmp_path)
    assert seen in ([], [[]])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["fifo", "folder", "link"])
def test_what_lies_in_the_place_of_the_ranks_lock_stops_nobody(tmp_path: Path, config: Config, kind: str) -> None:
    path = tmp_path / ".ranks.lock"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path)
    with own_run(config, tmp_path) as ticket:
        assert ticket.is_held(LocalStorage(tmp_path / "checkpoint"))


def test_a_launcher_that_was_overtaken_leaves_the_others_lease(tmp_path: Path, config: Config) -> None:
    """The first is paused until the second owns the run, then refused before it has written run.json."""
    place = LocalStorage(tmp_path / "run/checkpoint")
    with own_run(config, tmp_path / "run") as first:
        place.write("lease-2.json", elsewhere())
        (tmp_path / "run/.ranks.lock").touch()
    assert place.names() == ["lease-1.json", "lease-2.json"]
    assert (tmp_path / "run/.ranks.lock").exists()
    assert not first.is_held(place)
    with own_run(config, tmp_path / "other"):
        pass
    assert not (tmp_path / "other").exists(), "nothing was there but its own"


def test_a_folder_that_cannot_be_made_is_bad_input(tmp_path: Path, config: Config) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoint").touch()
    (tmp_path / "file").touch()
    places = [("run", r"^checkpoint.folder must .*run/checkpoint cannot"), ("file/run", r"^run.root must .*file/run")]
    for place, sentence in places:
        with pytest.raises(UserError, match=sentence), own_run(config, tmp_path / place):
            raise AssertionError


def test_a_timeout_is_at_most_an_hour(config: Config) -> None:
    changed = copy.deepcopy(config)
    changed.checkpoint.lease_timeout_s = 3601.0
    with pytest.raises(ValueError, match="checkpoint.lease_timeout_s must be at most 3600, but is 3601; use 60"):
        check_config(changed)
