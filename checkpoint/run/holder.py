"""Who holds a lease or a reader's lock, and whether that process is alive."""

import errno
import os
import platform
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, final

from msgspec import Meta

from regrow.checkpoint.processes import boot_id, has_ended, pid_namespace, process_stat

__all__ = ["LOCK_BYTES", "HeartbeatMonitor", "LeaseRecord", "Liveness", "is_no_file", "life_of", "this_process"]

# What a sentence can hold: no control characters, no halves of characters.
_LINE = r"^[^\x00-\x1f\x7f\u2028\u2029\ud800-\udfff]*\Z"
# Of a lease's or a reader lock's document.
LOCK_BYTES = 1 << 16
# What opening anything but a regular file gives: no process writes such a lease.
_NO_FILE = {errno.EISDIR, errno.EINVAL, errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.EFBIG, errno.ENAMETOOLONG}


class Liveness(Enum):
    """What can be said of a holder by looking once."""

    alive = "alive"
    dead = "dead"
    unknown = "unknown"


@dataclass(frozen=True, kw_only=True, slots=True)
class LeaseRecord:
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

    token: Annotated[str, Meta(min_length=1, max_length=64)]
    host: Annotated[str, Meta(max_length=255, pattern=_LINE)]
    boot: Annotated[str, Meta(max_length=64)]
    namespace: Annotated[str, Meta(pattern=r"^(pid:\[[0-9]{1,20}\])?\Z")]
    pid: Annotated[int, Meta(ge=1, lt=2**31)]
    started: Annotated[int, Meta(ge=0, le=2**62)]
    job: Annotated[str, Meta(max_length=255, pattern=_LINE)] | None = None
    restart: Annotated[int, Meta(ge=0, lt=2**31)] = 0
    timeout_s: Annotated[float, Meta(ge=0)] = 0.0
    counter: Annotated[int, Meta(ge=0, le=2**62)] = 0
    released: bool = False

    def __str__(self) -> str:
        if not self.pid:
            return "a lease that cannot be read"
        return f"process {self.pid} on {self.host}" + (f" (job {self.job})" if self.job else "")


def this_process() -> LeaseRecord:
    """The holder that this process would be."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")
    restarts = os.environ.get("SLURM_RESTART_COUNT", "")
    return LeaseRecord(
        token=uuid.uuid4().hex[:8],
        host=platform.node()[:255],
        boot=boot_id(),
        namespace=pid_namespace(),
        pid=os.getpid(),
        started=process_stat(os.getpid())[1],
        job=job and job[:255],
        restart=int(restarts) if re.fullmatch(r"[0-9]{1,9}", restarts) else 0,
    )


def life_of(holder: LeaseRecord, me: LeaseRecord) -> Liveness:
    """Whether a holder lives, as far as this process can see at once.

    A stopped process (SIGSTOP) may never go on: whether it does is for its counter to say.
    """
    if holder.released:
        return Liveness.dead
    if (holder.host, holder.boot, holder.namespace) != (me.host, me.boot, me.namespace) or not me.boot:
        # Another boot of this host would be the end of all its processes, but host names are not unique.
        return Liveness.unknown
    if has_ended(holder.pid, holder.started):
        return Liveness.dead
    state, _ = process_stat(holder.pid)
    return Liveness.unknown if not state or state in "Tt" else Liveness.alive


@final
class HeartbeatMonitor:
    """Measures for how long counters have not moved, on this process' own clock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[str, tuple[int, float]] = {}

    def idle_seconds(self, holder: LeaseRecord) -> float:
        """Seconds since this monitor first saw the counter at its present value."""
        now = self._clock()
        counter, since = self._seen.get(holder.token, (-1, now))
        if counter != holder.counter:
            since = now
        self._seen[holder.token] = (holder.counter, since)
        return now - since

    def has_moved(self, holder: LeaseRecord) -> bool:
        """Whether the counter has moved since it was last seen here; false for one that was not."""
        return holder.token in self._seen and self._seen[holder.token][0] != holder.counter


def is_no_file(error: OSError) -> bool:
    """Whether what could not be read is anything but a regular file of a fitting size."""
    return isinstance(error, IsADirectoryError) or error.errno in _NO_FILE
