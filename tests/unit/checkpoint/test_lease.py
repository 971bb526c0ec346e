"""Who may write: what can be seen of a holder, and what a second writer makes of it."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from regrow.checkpoint.documents import read_document
from regrow.checkpoint.errors import CheckpointError
from regrow.checkpoint.format.manifest import Manifest
from regrow.checkpoint.format.rank_manifest import rank_manifest_name
from regrow.checkpoint.run.lease import (
    LONGEST_TIMEOUT_S,
    HeartbeatMonitor,
    LeaseHeldError,
    LeaseLostError,
    LeaseRecord,
    Liveness,
    Standing,
    acquire_lease,
    life_of,
    newest_lease,
    this_process,
)
from regrow.checkpoint.run.reader_lock import held_by_readers, life_of_reader, reading
from regrow.checkpoint.save.commit import Committer
from regrow.checkpoint.storage.base import Storage
from regrow.checkpoint.storage.local import LocalStorage
from regrow.checkpoint.storage.opening import open_storage
from tests.late_storage import LateListings
from tests.support import wait_until


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """A folder that renames, and one that does not."""
    return open_storage(tmp_path / "c" if request.param == "local" else f"memory://{tmp_path}/c")


ELSEWHERE = dataclasses.replace(this_process(), host="elsewhere", boot="another", namespace="pid:[1]")


def test_this_process_is_alive_and_a_finished_one_is_dead() -> None:
    me = this_process()
    assert life_of(me, me) is Liveness.alive
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    started = int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19])
    other = dataclasses.replace(me, pid=child.pid, started=started)
    assert life_of(other, me) is Liveness.alive
    assert life_of(dataclasses.replace(other, started=started - 1), me) is Liveness.dead, "the pid was used again"
    child.send_signal(signal.SIGSTOP)
    wait_until(lambda: life_of(other, me) is not Liveness.alive)
    assert life_of(other, me) is Liveness.unknown, "a stopped process may never go on"
    child.kill()
    child.wait()
    assert life_of(other, me) is Liveness.dead
    assert life_of(dataclasses.replace(me, released=True), me) is Liveness.dead


def test_other_hosts_and_namespaces_cannot_be_looked_into() -> None:
    me = this_process()
    assert life_of(ELSEWHERE, me) is Liveness.unknown
    assert life_of(dataclasses.replace(me, namespace="pid:[1]"), me) is Liveness.unknown
    assert life_of(dataclasses.replace(me, boot="before"), me) is Liveness.unknown, (
        "another host may have the same name"
    )


@given(steps=st.lists(st.tuples(st.floats(0.1, 5), st.booleans()), max_size=20))
def test_a_counter_stands_still_on_the_watchers_own_clock(steps: list[tuple[float, bool]]) -> None:
    now = [0.0]
    watch, holder, since = HeartbeatMonitor(lambda: now[0]), ELSEWHERE, 0.0
    assert watch.idle_seconds(holder) == 0.0
    for seconds, moves in steps:
        now[0] += seconds
        if moves:
            holder = dataclasses.replace(holder, counter=holder.counter + 1)
            assert watch.has_moved(holder)
            since = now[0]
        assert watch.idle_seconds(holder) == now[0] - since
        assert not watch.has_moved(holder)


def test_a_second_writer_is_refused_by_the_firsts_name(folder: Storage) -> None:
    lease = acquire_lease(folder, 60.0, "the run", dataclasses.replace(this_process(), job="12"))
    with pytest.raises(LeaseHeldError, match=rf"the run is held by process {this_process().pid} on .* \(job 12\)"):
        acquire_lease(folder, 60.0, "the run")
    lease.release()
    second = acquire_lease(folder, 60.0, "the run")
    assert second.seized is None
    assert second.ticket.number == 2
    second.release()


def test_a_remote_writer_whose_counter_moves_is_alive(folder: Storage) -> None:
    lease = acquire_lease(folder, 0.6, "the run", ELSEWHERE)
    with pytest.raises(LeaseHeldError, match="on elsewhere"):
        acquire_lease(folder, 0.6, "the run")
    lease.release()


def test_a_silent_remote_writer_is_taken_over_and_can_commit_nothing(folder: Storage) -> None:
    lost = threading.Event()
    first = acquire_lease(folder, 0.5, "the run", ELSEWHERE, lost.set)
    # It is paused: its heart stands still.
    first._done.set()
    assert first._thread is not None
    first._thread.join()
    committer = Committer(folder, "old", first.ticket)
    place = committer.working_place(5)
    place.make()
    place.write(rank_manifest_name(0, committer.writer), b'{"plan": "p", "files": {}, "items": []}')
    started = time.monotonic()
    second = acquire_lease(folder, 0.5, "the run")
    assert time.monotonic() - started >= 0.5
    assert second.seized is not None
    report: dict[str, object] = {"error": None, "files": {}, "bytes": 39, "hash": "", "plan": "p"}
    with pytest.raises((LeaseLostError, OSError)):
        committer.commit(Manifest(step=5, lineage="a"), [report])
    assert not folder.exists("step-5/manifest.json")
    assert [n for n in folder.names() if "partial" in n] == []
    # The old writer's heart beats once more, and sees that the folder is another's.
    first._done.clear()
    first._beat()
    assert lost.is_set()
    assert second.ticket.is_held(folder)
    second.release()


def test_a_requeued_job_takes_over_at_once_where_its_predecessor_cannot_be_seen(folder: Storage) -> None:
    acquire_lease(folder, 600.0, "the run", dataclasses.replace(ELSEWHERE, job="7_1"))
    again = dataclasses.replace(this_process(), job="7_1", restart=1)
    started = time.monotonic()
    acquire_lease(folder, 600.0, "the run", again).release()
    assert time.monotonic() - started < 5


def test_a_requeued_job_waits_for_its_living_predecessor(folder: Storage) -> None:
    first = acquire_lease(folder, 600.0, "the run", dataclasses.replace(this_process(), job="7"))
    threading.Timer(0.5, first.release).start()
    started = time.monotonic()
    second = acquire_lease(folder, 600.0, "the run", dataclasses.replace(this_process(), job="7", restart=1))
    assert time.monotonic() - started >= 0.4
    assert second.seized is None
    second.release()


def test_of_many_that_try_one_wins(folder: Storage) -> None:
    folder.make()
    won: list[int] = []

    def attempt() -> None:
        try:
            won.append(acquire_lease(folder, 60.0, "the run").ticket.number)
        except LeaseHeldError:
            return

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Where files cannot be created exclusively (memory://), two may believe so for a moment, but one holds it.
    assert won
    number, holder = newest_lease(folder)
    assert holder is not None
    assert number == max(won)
    if isinstance(folder, LocalStorage):
        assert len(won) == 1


def test_a_step_that_is_read_is_held(folder: Storage) -> None:
    place, watch = folder.child("step-3"), HeartbeatMonitor()
    place.make()
    with reading(place):
        assert held_by_readers(place, watch, 60.0)
    assert not held_by_readers(place, watch, 60.0)


def test_a_dead_reader_holds_nothing(folder: Storage) -> None:
    place = folder.child("step-3")
    place.make()
    now = [0.0]
    watch = HeartbeatMonitor(lambda: now[0])
    place.write("reader-x.json", json.dumps(dataclasses.asdict(ELSEWHERE)).encode())
    assert held_by_readers(place, watch, 60.0), "not seen long enough to say"
    now[0] = 61.0
    assert not held_by_readers(place, watch, 60.0)
    dead: LeaseRecord = dataclasses.replace(this_process(), pid=2**22 - 1)
    place.write("reader-x.json", json.dumps(dataclasses.asdict(dead)).encode())
    assert not held_by_readers(place, watch, 60.0)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
FIELDS = [f.name for f in dataclasses.fields(LeaseRecord)]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changed=st.dictionaries(st.sampled_from([*FIELDS, "later"]), JSON, max_size=4), cut=st.integers(0, 400))
def test_whatever_a_lease_says_is_a_holder_within_bounds(
    tmp_path: Path, changed: dict[str, object], cut: int
) -> None:
    body = json.dumps({**dataclasses.asdict(ELSEWHERE), **changed}).encode()
    (tmp_path / "lease-3.json").write_bytes(body[:cut] if cut < 200 else body)
    number, holder = newest_lease(LocalStorage(tmp_path))
    assert number == 3
    assert holder is not None
    assert "\n" not in str(holder)
    assert len(str(holder)) < 600
    assert holder.timeout_s >= 0
    assert life_of(holder, this_process()) in Liveness
    if cut >= 200 and set(changed) <= {"later"}:
        assert holder == ELSEWHERE, "a field of a later version is passed over"


def test_a_lease_is_read_as_it_was_written() -> None:
    me = dataclasses.replace(this_process(), job="7_1", restart=3, timeout_s=60, counter=9, released=True)
    assert read_document(json.dumps(dataclasses.asdict(me)).encode(), LeaseRecord) == me


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_hole(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


IN_A_LEASES_PLACE: dict[str, Callable[[Path], object]] = {
    "fifo": make_fifo,
    "folder": Path.mkdir,
    "dangling link": lambda p: p.symlink_to("/nonexistent"),
    "looping link": lambda p: p.symlink_to(p.name),
    "device": lambda p: p.symlink_to("/dev/zero"),
    "empty": Path.touch,
    "large": lambda p: p.write_bytes(b" " * 100_000),
    "hole": make_hole,
    "deep": lambda p: p.write_bytes(b"[" * 60_000),
    "not a number": lambda p: p.write_text(json.dumps({**dataclasses.asdict(ELSEWHERE), "timeout_s": float("nan")})),
}


@pytest.mark.parametrize("kind", IN_A_LEASES_PLACE)
def test_what_is_no_lease_is_taken_over_when_it_has_stood_still(tmp_path: Path, kind: str) -> None:
    IN_A_LEASES_PLACE[kind](tmp_path / "lease-9.json")
    started = time.monotonic()
    lease = acquire_lease(LocalStorage(tmp_path), 0.3, "the run")
    assert 0.3 <= time.monotonic() - started < 1.3
    assert lease.ticket.number == 10
    assert [p.name for p in tmp_path.iterdir()] == ["lease-10.json"]
    lease.release()


@pytest.mark.parametrize(
    "name", ["lease-99999999999999999999.json", "lease-007.json", "lease-٣.json", "lease-0.json"]
)
def test_a_name_that_no_count_reaches_is_no_lease(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    lease = acquire_lease(LocalStorage(tmp_path), 60.0, "the run")
    assert lease.ticket.number == 1
    lease.release()


@pytest.mark.parametrize("times", [1, 100])
def test_a_lease_that_was_replaced_while_it_was_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """As an NFS client may see it (ESTALE); where it stays so, the storage fails, and nobody has taken over."""
    lease = acquire_lease(LocalStorage(tmp_path), 60.0, "the run")
    real, failed = LocalStorage.read, list[str]()

    def fail(self: LocalStorage, name: str, limit: int = 0) -> bytes:
        if len(failed) < times:
            failed.append(name)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), name)
        return real(self, name, limit)

    monkeypatch.setattr(LocalStorage, "read", fail)
    if times == 1:
        assert lease.ticket.is_held(lease.folder)
    else:
        with pytest.raises(OSError, match="Stale"):
            lease.ticket.is_held(lease.folder)
    monkeypatch.undo()
    lease.release()


def test_the_last_number_is_refused(tmp_path: Path) -> None:
    (tmp_path / f"lease-{10**15 - 1}.json").touch()
    with pytest.raises(CheckpointError, match=r"lease-999999999999999.json, which leaves no next one; remove it"):
        acquire_lease(LocalStorage(tmp_path), 60.0, "the run")


@pytest.mark.parametrize("timeout_s", [1e300, LONGEST_TIMEOUT_S])
def test_a_holder_with_an_absurd_timeout_is_not_waited_for(tmp_path: Path, timeout_s: float) -> None:
    silent = dataclasses.replace(ELSEWHERE, timeout_s=timeout_s)
    (tmp_path / "lease-4.json").write_text(json.dumps(dataclasses.asdict(silent)))
    started = time.monotonic()
    with pytest.raises(LeaseHeldError, match=r"must not change for 3600 s .*remove lease-4.json in .* has ended"):
        acquire_lease(LocalStorage(tmp_path), 0.3, "the run")
    assert time.monotonic() - started < 1.3


def test_a_holders_longer_timeout_is_waited_for(tmp_path: Path) -> None:
    silent = dataclasses.replace(ELSEWHERE, timeout_s=0.8)
    (tmp_path / "lease-4.json").write_text(json.dumps(dataclasses.asdict(silent)))
    started = time.monotonic()
    acquire_lease(LocalStorage(tmp_path), 0.2, "the run").release()
    assert 0.8 <= time.monotonic() - started < 1.8


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES])
@pytest.mark.parametrize("operation", ["link", "fsync", "open", "listdir"])
def test_a_folder_that_fails_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, operation: str
) -> None:
    real = getattr(os, operation)

    def fail(path: object, *args: object, **named: object) -> object:
        if operation == "fsync" or str(path).startswith(str(tmp_path / "c")):
            raise OSError(code, os.strerror(code), None if operation == "fsync" else str(path))
        return real(path, *args, **named)

    (tmp_path / "c").mkdir()
    monkeypatch.setattr(os, operation, fail)
    with pytest.raises(
        CheckpointError, match=rf"^checkpoint.folder must .*{tmp_path}/c.* cannot \({os.strerror(code)}"
    ):
        acquire_lease(LocalStorage(tmp_path / "c"), 1.0, "the run")
    monkeypatch.undo()
    assert not list((tmp_path / "c").glob(".*.tmp"))
    acquire_lease(LocalStorage(tmp_path / "c"), 1.0, "the run").release()


@pytest.mark.parametrize("kind", ["a file", "below a file", "a dangling link", "a looping link"])
def test_what_is_no_folder_is_one_sentence(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "c"
    if kind == "below a file":
        place.touch()
        place = place / "d"
    elif kind == "a file":
        place.touch()
    else:
        place.symlink_to("/nonexistent/c" if kind == "a dangling link" else place)
    with pytest.raises(CheckpointError, match=rf"run.root must be a folder .*, but {place}.* cannot"):
        acquire_lease(LocalStorage(place), 1.0, "the run", setting="run.root")


def test_late_listings_stop_nobody_and_hide_nobody(folder: Storage) -> None:
    """The listing shows what was there a while ago, but for less than the timeout."""
    folder.make()
    late = LateListings(folder, 0.5)
    lost = threading.Event()
    first = acquire_lease(late, 0.6, "the run", on_lost=lost.set)
    assert late.names() == []
    assert first.ticket.is_held(late)
    with pytest.raises(LeaseHeldError):
        acquire_lease(late, 0.6, "the run")
    time.sleep(0.3)
    assert not lost.is_set(), "beats before the lease is listed"
    first.release()
    second = acquire_lease(late, 0.6, "the run")
    assert second.ticket.number == 2
    assert late.names() != ["lease-2.json"]
    assert first.ticket.standing(late) is not Standing.held, "taken over, although no listing says so"
    assert second.ticket.is_held(late)
    second.release()


@pytest.mark.parametrize("what", ["lease", "folder"])
def test_a_removed_lease_is_no_takeover(tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture) -> None:
    folder, lost = LocalStorage(tmp_path / "c"), threading.Event()
    lease = acquire_lease(folder, 0.3, "the run", on_lost=lost.set)
    committer = Committer(folder, "t", lease.ticket)
    (tmp_path / "c/kept").touch()
    if what == "lease":
        folder.remove("lease-1.json")
    else:
        LocalStorage(tmp_path).remove("c")
    committer.check_lease()
    sentence = "lease-1.json was removed" if what == "lease" else "c must stay .* was removed or emptied"
    with pytest.raises(LeaseLostError, match=sentence):
        committer.check_lease(must_be_seen=True)
    assert lost.wait(3.0)
    assert "another writer" not in caplog.text
    assert "nothing more is saved" in caplog.text
    lease.release()
    assert not folder.exists("lease-1.json")


def test_a_lease_that_cannot_be_read_for_a_moment_is_not_lost(tmp_path: Path) -> None:
    """Its own holder writes over what is not another's."""
    folder, lost = LocalStorage(tmp_path), threading.Event()
    lease = acquire_lease(folder, 0.3, "the run", on_lost=lost.set)
    (tmp_path / "lease-1.json").write_bytes(b"half a ")
    assert lease.ticket.is_held(folder)

    def is_mended() -> bool:
        number, holder = newest_lease(folder)
        return number == 1 and holder is not None and holder.token == lease.ticket.token

    wait_until(is_mended, 5.0)
    assert not lost.is_set()
    lease.release()


def test_a_launcher_withdraws_its_own_lease_alone(folder: Storage) -> None:
    first = acquire_lease(folder, 0.2, "the run", ELSEWHERE)
    first._done.set()
    second = acquire_lease(folder, 0.2, "the run")
    assert not first.withdraw()
    assert second.ticket.is_held(folder)
    assert second.withdraw()
    assert folder.names() == []


def test_a_writer_whose_temporary_file_is_cleared_away_writes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another launcher takes it for a killed one's: nothing is lost by that."""
    folder, real = LocalStorage(tmp_path), LocalStorage._temporary
    cleared: list[Path] = []

    def clear_first(self: LocalStorage, name: str, data: bytes) -> Path:
        path = real(self, name, data)
        if not cleared:
            cleared.append(path)
            path.unlink()
        return path

    monkeypatch.setattr(LocalStorage, "_temporary", clear_first)
    folder.write("a", b"one")
    cleared.clear()
    assert folder.create("b", b"two")
    cleared.clear()
    assert not folder.create("b", b"three")
    assert (folder.read("a"), folder.read("b")) == (b"one", b"two")
    assert folder.names() == ["a", "b"]


@pytest.mark.parametrize("kind", IN_A_LEASES_PLACE)
def test_what_is_no_readers_lock_holds_nothing(tmp_path: Path, kind: str) -> None:
    IN_A_LEASES_PLACE[kind](tmp_path / "reader-x.json")
    assert not held_by_readers(LocalStorage(tmp_path), HeartbeatMonitor(), 60.0)


def test_a_lock_that_may_not_be_read_may_have_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "reader-x.json").touch()

    def deny(self: LocalStorage, name: str, limit: int = 0) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)

    monkeypatch.setattr(LocalStorage, "read", deny)
    assert life_of_reader(LocalStorage(tmp_path), "reader-x.json", HeartbeatMonitor(), 0.0) is Liveness.unknown
    assert held_by_readers(LocalStorage(tmp_path), HeartbeatMonitor(), 0.0)
