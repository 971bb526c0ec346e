"""Who may write: what can be seen of a holder, and what a second writer makes of it."""

import dataclasses
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from checkpoint.commit import Committer
from checkpoint.contents import rank_manifest_name
from checkpoint.lease import (
    Holder,
    LeaseHeldError,
    LeaseLostError,
    Life,
    Watch,
    acquire_lease,
    life_of,
    newest_lease,
    this_process,
)
from checkpoint.manifest import Manifest
from checkpoint.reading import held_by_readers, reading
from checkpoint.storage.base import Storage
from checkpoint.storage.local import LocalStorage
from checkpoint.storage.opening import open_storage
from tests.support import wait_until


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """A folder that renames, and one that does not."""
    return open_storage(tmp_path / "c" if request.param == "local" else f"memory://{tmp_path}/c")


ELSEWHERE = dataclasses.replace(this_process(), host="elsewhere", boot="another", namespace="pid:[1]")


def test_this_process_is_alive_and_a_finished_one_is_dead() -> None:
    me = this_process()
    assert life_of(me, me) is Life.alive
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    started = int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19])
    other = dataclasses.replace(me, pid=child.pid, started=started)
    assert life_of(other, me) is Life.alive
    assert life_of(dataclasses.replace(other, started=started - 1), me) is Life.dead, "the pid was used again"
    child.send_signal(signal.SIGSTOP)
    wait_until(lambda: life_of(other, me) is not Life.alive)
    assert life_of(other, me) is Life.unknown, "a stopped process may never go on"
    child.kill()
    child.wait()
    assert life_of(other, me) is Life.dead
    assert life_of(dataclasses.replace(me, released=True), me) is Life.dead


def test_other_hosts_and_namespaces_cannot_be_looked_into() -> None:
    me = this_process()
    assert life_of(ELSEWHERE, me) is Life.unknown
    assert life_of(dataclasses.replace(me, namespace="pid:[1]"), me) is Life.unknown
    assert life_of(dataclasses.replace(me, boot="before"), me) is Life.unknown, "another host may have the same name"


@given(steps=st.lists(st.tuples(st.floats(0.1, 5), st.booleans()), max_size=20))
def test_a_counter_stands_still_on_the_watchers_own_clock(steps: list[tuple[float, bool]]) -> None:
    now = [0.0]
    watch, holder, since = Watch(lambda: now[0]), ELSEWHERE, 0.0
    assert watch.still_for(holder) == 0.0
    for seconds, moves in steps:
        now[0] += seconds
        if moves:
            holder = dataclasses.replace(holder, counter=holder.counter + 1)
            assert watch.has_moved(holder)
            since = now[0]
        assert watch.still_for(holder) == now[0] - since
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
    place, watch = folder.child("step-3"), Watch()
    place.make()
    with reading(place):
        assert held_by_readers(place, watch, 60.0)
    assert not held_by_readers(place, watch, 60.0)


def test_a_dead_reader_holds_nothing(folder: Storage) -> None:
    import json

    place = folder.child("step-3")
    place.make()
    now = [0.0]
    watch = Watch(lambda: now[0])
    place.write("reader-x.json", json.dumps(dataclasses.asdict(ELSEWHERE)).encode())
    assert held_by_readers(place, watch, 60.0), "not seen long enough to say"
    now[0] = 61.0
    assert not held_by_readers(place, watch, 60.0)
    dead: Holder = dataclasses.replace(this_process(), pid=2**22 - 1)
    place.write("reader-x.json", json.dumps(dataclasses.asdict(dead)).encode())
    assert not held_by_readers(place, watch, 60.0)
