"""The lease: one writer per checkpoint folder, written beside the bytes that it protects.

On one host a holder is alive as long as its process is. From elsewhere it is alive as long as its counter moves,
watched on the waiter's own clock: no file's time and no two clocks are ever compared. Takeovers are numbered, and a
number can be created once: of several that try, one wins, and the one taken over sees a higher number than its own.
"""

import json
import logging
import os
import platform
import re
import threading
import time
import uuid
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import final

from checkpoint.errors import CheckpointError
from checkpoint.storage.base import Storage

__all__ = [
    "Holder",
    "Lease",
    "LeaseHeldError",
    "LeaseLostError",
    "Life",
    "Ticket",
    "Watch",
    "acquire_lease",
    "forget_lease",
    "life_of",
    "this_process",
]

log = logging.getLogger(__name__)

_NAME = re.compile(r"lease-(\d+)\.json")
_PARTIAL = re.compile(r"step-\d+\.partial-.*")
# So many beats fit into the time after which a silent holder is taken for dead.
_BEATS = 6
_POLL_S = 0.1


class LeaseHeldError(CheckpointError):
    """Another process writes into this folder."""


class LeaseLostError(CheckpointError):
    """Another process has taken this folder over."""


class Life(Enum):
    """What can be said of a holder by looking once."""

    alive = "alive"
    dead = "dead"
    unknown = "unknown"


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """Who holds a lease.

    Attributes:
        token: of this acquisition.
        host: its name.
        boot: the kernel's boot id.
        namespace: of process ids.
        pid: within that.
        started: the process' start, in ticks since boot; tells a pid that was used again.
        job: the scheduler's id of the job, of the array's task where it is one.
        restart: how often the scheduler has started that job again.
        timeout_s: the holder's own measure: its counter moves six times within it.
        counter: moves as long as the holder lives.
        released: the holder is done.
    """

    token: str
    host: str
    boot: str
    namespace: str
    pid: int
    started: int
    job: str | None = None
    restart: int = 0
    timeout_s: float = 0.0
    counter: int = 0
    released: bool = False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f" (job {self.job})" if self.job else "")


def this_process() -> Holder:
    """The holder that this process would be."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return Holder(
        token=uuid.uuid4().hex[:8],
        host=platform.node(),
        boot=_read("/proc/sys/kernel/random/boot_id").strip(),
        namespace=_namespace(),
        pid=os.getpid(),
        started=_process_stat(os.getpid())[1],
        job=f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID"),
        restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
    )


def _namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _process_stat(pid: int) -> tuple[str, int]:
    """A process' state letter and start time; `("", 0)` where there is none."""
    # The name, in brackets, may hold anything; the fields are counted from behind it.
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return (fields[0], int(fields[19])) if len(fields) > 19 else ("", 0)


def life_of(holder: Holder, me: Holder) -> Life:
    """Whether a holder lives, as far as this process can see at once.

    A stopped process (SIGSTOP) may never go on: whether it does is for its counter to say.
    """
    if holder.released:
        return Life.dead
    if (holder.host, holder.boot, holder.namespace) != (me.host, me.boot, me.namespace) or not me.boot:
        # Another boot of this host would be the end of all its processes, but host names are not unique.
        return Life.unknown
    state, started = _process_stat(holder.pid)
    if not state or started != holder.started or state in "ZX":
        return Life.dead
    return Life.unknown if state in "Tt" else Life.alive


@final
class Watch:
    """Sees counters stand still, on this process' own clock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[str, tuple[int, float]] = {}

    def still_for(self, holder: Holder) -> float:
        """Seconds since this watch first saw the counter where it is."""
        now = self._clock()
        counter, since = self._seen.get(holder.token, (-1, now))
        if counter != holder.counter:
            since = now
        self._seen[holder.token] = (holder.counter, since)
        return now - since

    def has_moved(self, holder: Holder) -> bool:
        """Whether the counter is not what this watch saw last; false for one that it has not seen."""
        return holder.token in self._seen and self._seen[holder.token][0] != holder.counter


@dataclass(frozen=True, kw_only=True, slots=True)
class Ticket:
    """A lease as other processes of the same run know it.

    Attributes:
        number: of the takeover.
        token: of the holder.
    """

    number: int
    token: str

    def is_held(self, folder: Storage) -> bool:
        """Whether the newest lease is still this one."""
        number, holder = newest_lease(folder)
        return number == self.number and holder is not None and holder.token == self.token


def newest_lease(folder: Storage) -> tuple[int, Holder | None]:
    """The newest lease's number and holder; (0, None) where there is none."""
    numbers = [int(m.group(1)) for m in map(_NAME.fullmatch, folder.names()) if m]
    if not numbers:
        return 0, None
    try:
        return max(numbers), Holder(**json.loads(folder.read(_name(max(numbers)))))
    except FileNotFoundError:
        # Removed by the one that took it over in between.
        return newest_lease(folder)
    except (ValueError, TypeError):
        # Being written, or another version's: somebody's, until it has stood still for long enough.
        body = folder.read(_name(max(numbers)))
        return max(numbers), Holder(
            token=f"unreadable-{max(numbers)}", host="an unreadable lease", boot="", namespace="", pid=0, started=0,
            counter=zlib.crc32(body),
        )  # fmt: skip


def _name(number: int) -> str:
    return f"lease-{number}.json"


def _encode(holder: Holder) -> bytes:
    return json.dumps(asdict(holder)).encode()


@dataclass(slots=True)
class Lease:
    """A lease that this process holds; a thread keeps its counter moving.

    Attributes:
        folder: the checkpoint folder.
        ticket: for the processes that write.
        seized: the holder before had not released it: it was killed, or was silent.
        on_lost: called in the lease's thread when another writer has taken over.
    """

    folder: Storage
    ticket: Ticket
    seized: Holder | None
    on_lost: Callable[[], None]
    _holder: Holder
    _every_s: float
    _done: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Begins to move the counter."""
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._done.wait(self._every_s):
            try:
                if not self.ticket.is_held(self.folder):
                    log.error("another writer has taken over %s; this one stops", self.folder.url)
                    self.on_lost()
                    return
                self._holder = replace(self._holder, counter=self._holder.counter + 1)
                self.folder.write(_name(self.ticket.number), _encode(self._holder))
            except OSError as error:
                log.warning("the lease in %s cannot be renewed: %s", self.folder.url, error)

    def release(self) -> None:
        """Lets the next writer in at once."""
        self._done.set()
        if self._thread is not None:
            self._thread.join()
        try:
            if self.ticket.is_held(self.folder):
                self.folder.write(_name(self.ticket.number), _encode(replace(self._holder, released=True)))
        except OSError as error:
            log.warning("the lease in %s cannot be released: %s", self.folder.url, error)


def acquire_lease(
    folder: Storage,
    timeout_s: float,
    what: str,
    me: Holder | None = None,
    on_lost: Callable[[], None] = lambda: None,
) -> Lease:
    """Makes this process the folder's one writer.

    Args:
        folder: the checkpoint folder; made where it is missing.
        timeout_s: after which a holder that cannot be looked at, and whose counter stands still, is dead.
        what: the folder's run, for the message.
        me: this process, unless told otherwise.
        on_lost: called, in a thread, when another writer has taken over all the same.

    Raises:
        LeaseHeldError: another process lives and writes there.
    """
    me = replace(me or this_process(), timeout_s=timeout_s)
    folder.make()
    watch, announced = Watch(), False
    while True:
        number, holder = newest_lease(folder)
        if holder is not None and holder.token == me.token:
            # Written, although the storage's answer was lost and its retry was refused.
            return _taken(folder, number, me, None, timeout_s, on_lost)
        if holder is None or _may_take(holder, me, watch, max(timeout_s, holder.timeout_s), what):
            if folder.create(_name(number + 1), _encode(me)):
                return _taken(folder, number + 1, me, holder, timeout_s, on_lost)
            continue
        if not announced:
            log.info("%s is held by %s; waiting to see whether it is alive", what, holder)
            announced = True
        time.sleep(min(_POLL_S, timeout_s / _BEATS))


def _may_take(holder: Holder, me: Holder, watch: Watch, timeout_s: float, what: str) -> bool:
    """Whether the holder is gone; false while that is not yet clear; raises where it is not."""
    life = life_of(holder, me)
    requeued = holder.job is not None and holder.job == me.job and me.restart > holder.restart
    if life is Life.dead or (requeued and life is Life.unknown):
        return True
    moved = watch.has_moved(holder)
    if watch.still_for(holder) >= timeout_s and life is Life.unknown:
        return True
    if not requeued and (life is Life.alive or moved):
        raise LeaseHeldError(
            f"run.name must not name a run that is being trained, but {what} is held by {holder}; stop it or choose "
            "another run.name"
        )
    return False


def _taken(
    folder: Storage,
    number: int,
    me: Holder,
    before: Holder | None,
    timeout_s: float,
    on_lost: Callable[[], None],
) -> Lease:
    """The lease is written: now what a paused writer could still make valid goes away."""
    for name in folder.names():
        match = _NAME.fullmatch(name)
        if match and int(match.group(1)) < number:
            folder.remove(name)
        elif _PARTIAL.fullmatch(name):
            # Renamed first: half of what the old writer has open must not keep the name that it will rename.
            doomed = f"{name.split('.')[0]}.removing-{me.token}"
            with suppress(FileNotFoundError):  # its writer, still dying, has just committed or removed it
                folder.move(name, doomed)
                folder.remove(doomed)
    seized = before if before is not None and not before.released else None
    if seized is not None:
        log.info("took %s over from %s", folder.url, seized)
    lease = Lease(folder, Ticket(number=number, token=me.token), seized, on_lost, me, timeout_s / _BEATS)
    lease.start()
    return lease


def forget_lease(folder: Storage) -> None:
    """Removes all leases of a folder that nobody has written into."""
    for name in folder.names():
        if _NAME.fullmatch(name):
            folder.remove(name)
