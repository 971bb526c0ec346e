"""The thread that watches its own rank's steps, and ends it when one hangs."""

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import final

from regrow.trainer.phase import Phase
from regrow.trainer.watch.notes import Member, Note, Notes, end_process
from regrow.trainer.watch.report import find, write_report
from regrow.trainer.watch.stacks import is_compiling, own_frames, place_of
from regrow.trainer.watch.verdict import blamed, someone_is_busy

__all__ = ["Watched", "Watcher"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Watched:
    """What the watcher is told.

    Attributes:
        rank: this one.
        members: all ranks.
        folder: of the reports.
        look: the phase and the last step done, now.
        limit_s: what a part of a step may take now; None while nothing is watched.
        min_s: the least that it may ever take.
        abort_after_s: the longest from finding a hanging step to the end of this rank.
        failed: writes down why a rank has failed.
        record: what the flight recorder has; None where there is none.
    """

    rank: int
    members: Sequence[Member]
    folder: Path
    look: Callable[[], tuple[Phase, int]]
    limit_s: Callable[[], float | None]
    min_s: float
    abort_after_s: float
    failed: Callable[[int, str], None]
    record: Callable[[], bytes | None]


@final
class Watcher:
    """Looks at the rank some times in what a step may take at least; touches nothing while steps go on.

    Args:
        watched: see `Watched`.
        notes: of this start.
    """

    def __init__(self, watched: Watched, notes: Notes) -> None:
        self._watched, self._notes = watched, notes
        self._poll_s = min(1.0, max(0.02, watched.min_s / 20))
        # Longer than a note takes to be seen on a network file system that asks its server every few seconds.
        self._silent_s = max(1.0, 10 * self._poll_s)
        self._closed = threading.Event()
        self._place: tuple[Phase, int] = (Phase.outside, -1)
        self._in_phase_s = self._in_step_s = 0.0
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begins."""
        self._thread.start()

    def close(self) -> None:
        """Ends the thread; a step that it has found to hang ends the process first."""
        self._closed.set()
        self._thread.join()
        self._notes.close()

    def _run(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(self._poll_s):
            now = time.monotonic()
            # After a pause of this whole process nothing has hung for that long.
            elapsed, last = min(now - last, 5 * self._poll_s), now
            try:
                self._look(elapsed)
            except Exception:
                log.exception("the watchdog of rank %d failed, and goes on", self._watched.rank)

    def _look(self, elapsed: float) -> None:
        place = self._watched.look()
        self._in_step_s = self._in_step_s + elapsed if place[1] == self._place[1] else 0.0
        self._in_phase_s = self._in_phase_s + elapsed if place == self._place else 0.0
        self._place = place
        limit = self._watched.limit_s()
        # Whoever waits for this rank wants to know how it is.
        if self._in_step_s < (limit or self._watched.min_s) / 2:
            return
        note = self._note()
        self._notes.publish(note)
        notes = self._notes.read()
        if limit is None or self._in_phase_s < limit or not note.is_regular:
            return
        answering = [rank for rank in notes if self._notes.heard(rank, self._silent_s)]
        if not someone_is_busy(notes, answering, limit):
            self._end(notes, answering)

    def _note(self, *, hangs: bool = False) -> Note:
        phase, step = self._place
        collective, place = place_of(own_frames())
        name = "compiling" if phase.is_regular and is_compiling() else phase.name
        return Note(
            beat=0,
            step=step,
            phase=name,
            since_s=self._in_phase_s,
            collective=collective[:100],
            place=place[:300],
            hangs=hangs,
        )

    def _has_gone_on(self) -> bool:
        return self._watched.look() != self._place

    def _end(self, notes: dict[int, Note], answering: list[int]) -> None:
        """Reports, and ends this process; returns only where the step has gone on meanwhile."""
        began, watched = time.monotonic(), self._watched
        step = self._place[1] + (self._place[0] is not Phase.reduction)
        folder = watched.folder / f"step-{step}-{self._notes.token}"
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        own = _dump_own(folder / f"rank-{watched.rank}.threads.txt")
        # Whatever happens below, even with the interpreter's lock held by others, the process ends.
        faulthandler.dump_traceback_later(watched.abort_after_s, exit=True, file=own or sys.stderr)
        leads = watched.rank == min([watched.rank, *(r for r in answering if watched.members[r].is_here)])
        # The others of this host come to the same result, and say so.
        wait_s = max(0.5, 2 * self._poll_s) if leads else 0.7 * watched.abort_after_s
        while time.monotonic() - began < wait_s and not self._has_gone_on():
            if not leads and (folder / "report.json").exists():
                break
            self._notes.publish(self._note(hangs=True))
            self._closed.wait(self._poll_s)
        if self._has_gone_on():
            faulthandler.cancel_dump_traceback_later()
            if own is not None:
                os.close(own)
            log.warning("step %d took long, and has gone on; see %s", step, folder)
            return
        if leads or not (folder / "report.json").exists():
            self._lead(folder, step, answering)
        self._write_record(folder)
        _exit()

    def _lead(self, folder: Path, step: int, answering: list[int]) -> None:
        """Writes the report for this host, and ends its ranks that do not answer."""
        watched = self._watched
        own = self._note(hangs=True)
        notes, heard = {**self._notes.read(), watched.rank: own}, [*answering, watched.rank]
        findings = find(watched.members, notes, heard, folder, watched.abort_after_s / 4)
        # One report a host; the first rank's has the plain name.
        name = "report" if watched.rank == min(heard) else f"report-rank-{watched.rank}"
        told = write_report(folder, name, findings, step, self._in_phase_s)
        log.error("%s; stacks are in %s", told, folder)
        if len(watched.members) == 1:
            print(f"error: rank 0: {told}; stacks are in {folder}", file=sys.stderr, flush=True)
        # Those that are missing; of several ranks of which none is, the one that tells.
        for finding in blamed(findings) or [f for f in findings if f.member.rank == watched.rank]:
            watched.failed(finding.member.rank, f"{told}; stacks are in {folder}")
        for finding in findings:
            if not finding.answers and finding.member.is_here and end_process(finding.member):
                log.error("rank %d (process %d) was killed", finding.member.rank, finding.member.pid)

    def _write_record(self, folder: Path) -> None:
        record = self._watched.record()
        if record is not None:
            with suppress(OSError):
                (folder / f"rank-{self._watched.rank}.flight").write_bytes(record)


def _dump_own(path: Path) -> int | None:
    """All threads of this process as they are now; returns the file, kept open for a second look."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        faulthandler.dump_traceback(descriptor, all_threads=True)
    except OSError:
        return None
    return descriptor


def _exit() -> None:
    """At once: other threads of this process may hang for good."""
    for handler in logging.getLogger().handlers:
        with suppress(Exception):
            handler.flush()
    os._exit(1)
