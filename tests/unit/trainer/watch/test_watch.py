"""A rank seen from beside it: notes, stacks, who is missing, and that no other process is ever ended."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from regrow.checkpoint.processes import process_stat, process_tag
from regrow.errors import ConfigError
from regrow.trainer.hooks.watchdog import WatchdogHook
from regrow.trainer.hooks.watchdog_config import WatchdogConfig
from regrow.trainer.phase import Phase
from regrow.trainer.watch.notes import Member, Note, Notes, clear_old_notes, end_process
from regrow.trainer.watch.stacks import Frame, is_compiling, own_frames, phase_of, place_of, stacks_of, state_of
from regrow.trainer.watch.verdict import Finding, blamed, sentence, someone_is_busy
from regrow.trainer.watch.watcher import Watched, Watcher

LOOP, C10D = "/x/regrow/trainer/loop.py", "/x/torch/distributed/distributed_c10d.py"


def note(phase: str = "forward_backward", since_s: float = 60.0, collective: str = "") -> Note:
    return Note(beat=0, step=3, phase=phase, since_s=since_s, collective=collective, place="somewhere")


def member(rank: int, pid: int = 1, tag: str = "") -> Member:
    return Member(rank=rank, host="here", pid=pid, tag=tag)


def finding(rank: int, collective: str = "", *, answers: bool = True, state: str = "") -> Finding:
    place = f"{collective or 'matmul'}, called by f (regrow/x.py:{1 + bool(collective)})"
    return Finding(
        member=member(rank), answers=answers, phase="forward and backward", collective=collective, place=place,
        state=state,
    )  # fmt: skip


def test_notes_are_seen_by_the_others_and_taken_away(tmp_path: Path) -> None:
    (tmp_path / "live-00000001").mkdir()
    (tmp_path / "step-3").mkdir()
    clear_old_notes(tmp_path)
    one, two = (Notes(tmp_path / "live-aabbccdd", rank, 2) for rank in (0, 1))
    assert one.read() == {}
    assert not one.heard(1, 60.0)
    two.publish(note(since_s=7.0))
    assert one.read()[1].since_s == 7.0
    assert one.heard(1, 60.0)
    time.sleep(0.05)
    # Nothing new has come.
    assert one.read()
    assert not one.heard(1, 0.04)
    two.publish(note())
    assert one.read()
    assert one.heard(1, 0.04)
    (tmp_path / "live-aabbccdd/rank-1").write_text("{cut short")
    assert one.read() == {}
    two.close()
    one.close()
    assert [p.name for p in tmp_path.iterdir()] == ["step-3"]


def test_a_disk_that_takes_no_notes_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    notes = Notes(tmp_path / "file/live-aabbccdd", 0, 1)
    notes.publish(note())
    assert notes.read() == {}
    notes.close()


@pytest.mark.parametrize(
    ("others", "busy"),
    [
        ({1: note()}, False),
        ({1: note("hooks")}, True),
        ({1: note("compiling")}, True),
        ({1: note(since_s=2.0)}, True),
        ({}, False),
    ],
)
def test_whoever_answers_and_is_busy_is_waited_for(others: dict[int, Note], *, busy: bool) -> None:
    assert someone_is_busy(others, list(others), 10.0) is busy
    assert not someone_is_busy(others, [], 10.0)


def test_who_is_missing() -> None:
    waits = [finding(0, "all_reduce"), finding(2, "all_reduce")]
    silent = finding(1, answers=False, state="stopped by a signal")
    assert blamed([*waits, silent]) == [silent]
    assert blamed([*waits, finding(1)]) == [finding(1)]
    assert blamed(waits) == []
    assert blamed([finding(0)]) == [finding(0)]
    told = sentence([waits[0], silent, waits[1]], 12, 33.3)
    assert told == (
        "step 12 hangs since 33 s: rank 1 (process 1 on here) does not answer; it is stopped by a signal; missing in "
        "forward and backward at matmul, called by f (regrow/x.py:1); ranks 0, 2 wait in forward and backward at "
        "all_reduce, called by f (regrow/x.py:2)"
    )
    assert "no rank is missing" in sentence(waits, 1, 5.0)


def test_places_and_phases() -> None:
    inside = [
        Frame("wait", "/x/torch/y.py", 1), Frame("all_reduce", C10D, 2), Frame("wrapper", "/x/torch/c10d_logger.py", 3),
        Frame("finish", "/x/regrow/trainer/reduction.py", 4), Frame("_settle", LOOP, 5), Frame("_step", LOOP, 6),
    ]  # fmt: skip
    assert place_of(inside) == ("all_reduce", "all_reduce, called by finish (regrow/trainer/reduction.py:4)")
    assert phase_of(inside) is Phase.reduction
    assert phase_of([Frame("_step", LOOP, 6)]) is Phase.hooks
    assert phase_of([]) is Phase.outside
    assert place_of([Frame("f", "/x/regrow/a.py", 1)]) == ("", "f (regrow/a.py:1)")
    assert place_of(())[0] == ""
    assert {p.name for p in Phase if not p.is_regular} == {"outside", "hooks"}
    assert any(f.function == "test_places_and_phases" for f in own_frames())
    assert not is_compiling()


@pytest.fixture
def stopped() -> Iterator[subprocess.Popen[bytes]]:
    """A Python that is stopped in a function."""
    program = "import time\ndef deep():\n    print('in', flush=True)\n    time.sleep(60)\ndeep()\n"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        os.kill(process.pid, signal.SIGSTOP)
        yield process
        process.kill()


def test_a_stopped_process_is_read_and_ended(stopped: subprocess.Popen[bytes]) -> None:
    assert "deep" in [f.function for f in stacks_of(stopped.pid, 10.0).main]
    assert state_of(stopped.pid) == "stopped by a signal"
    prefix, started = process_tag().split("-")[0], process_stat(stopped.pid)[1]
    # Another process that has had the number before, and one of another host.
    assert not end_process(member(1, stopped.pid, f"{prefix}-{stopped.pid}-{started - 1}"))
    assert not end_process(member(1, stopped.pid, f"00000000-{stopped.pid}-{started}"))
    assert state_of(stopped.pid) == "stopped by a signal"
    assert end_process(member(1, stopped.pid, f"{prefix}-{stopped.pid}-{started}"))
    assert stopped.wait(10) == -signal.SIGKILL
    assert not end_process(member(1, stopped.pid, f"{prefix}-{stopped.pid}-{started}"))


def test_what_py_spy_cannot_read_is_said() -> None:
    assert stacks_of(2**22 + 1, 10.0).text.startswith("py-spy cannot read the process")


def watcher(folder: Path, place: list[tuple[Phase, int]], limit: float | None) -> Watcher:
    watched = Watched(
        rank=0,
        members=[member(0, os.getpid(), process_tag())],
        folder=folder,
        look=lambda: place[0],
        limit_s=lambda: limit,
        min_s=0.2,
        abort_after_s=5.0,
        failed=lambda rank, told: None,
        record=lambda: None,
    )
    return Watcher(watched, Notes(folder / "live-aabbccdd", 0, 1))


@pytest.mark.parametrize(
    ("place", "limit"), [((Phase.hooks, 3), 0.2), ((Phase.outside, 3), 0.2), ((Phase.update, 3), None)]
)
def test_what_is_not_watched_ends_nothing(tmp_path: Path, place: tuple[Phase, int], limit: float | None) -> None:
    watching = watcher(tmp_path, [place], limit)
    watching.start()
    time.sleep(0.6)
    watching.close()
    assert not list(tmp_path.glob("step-*"))


def test_a_step_that_goes_on_after_all_is_left_alone(tmp_path: Path) -> None:
    place = [(Phase.update, 3)]
    watching = watcher(tmp_path, place, 0.2)
    watching.start()
    folder = tmp_path / "step-4-aabbccdd"
    deadline = time.monotonic() + 10.0
    while not (folder / "rank-0.threads.txt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    place[0] = (Phase.data, 4)
    threading.Event().wait(0.3)
    place[0] = (Phase.hooks, 4)
    watching.close()
    assert not (folder / "report.json").exists()
    assert "test_a_step_that_goes_on_after_all" in (folder / "rank-0.threads.txt").read_text()


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"factor": 0.5}, "factor"), ({"min_s": 0.0}, "min_s"), ({"abort_after_s": 0.0}, "abort_after_s"), ({"warmup": 0}, "warmup")],
)  # fmt: skip
def test_bad_fields(fields: dict[str, float], named: str) -> None:
    with pytest.raises(ConfigError, match=rf"hooks\.watchdog\.{named} must be at least"):
        WatchdogHook(WatchdogConfig(**fields))  # type: ignore[arg-type]
