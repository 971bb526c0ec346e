"""Locks of readers: a step that is being read is not removed."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace

from regrow.checkpoint.documents import DocumentError, read_document
from regrow.checkpoint.run.holder import (
    LOCK_BYTES,
    HeartbeatMonitor,
    LeaseRecord,
    Liveness,
    is_no_file,
    life_of,
    this_process,
)
from regrow.checkpoint.storage.base import Storage

__all__ = ["held_by_readers", "is_reader_lock", "life_of_reader", "reading"]

_PREFIX = "reader-"
_SUFFIX = ".json"
_BEAT_S = 5.0


@contextmanager
def reading(folder: Storage, *, survives: bool = False) -> Iterator[None]:
    """Keeps a step from being removed by its run's retention while it is read.

    A folder that cannot be written (another user's checkpoint, a read-only mount) is read without a lock.

    Args:
        folder: the step's.
        survives: a reader that is killed keeps the step for as long as one on another host that falls silent
            (`checkpoint.reader_timeout_s`), so that it can come back.
    """
    me, done = this_process(), threading.Event()
    if survives:
        # Nobody can tell at once whether such a process has ended.
        me = replace(me, boot="")
    name = f"{_PREFIX}{me.token}{_SUFFIX}"
    try:
        folder.write(name, json.dumps(asdict(me)).encode(), flush=False)
    except OSError:
        yield
        return

    def beat() -> None:
        holder = me
        while not done.wait(_BEAT_S):
            holder = replace(holder, counter=holder.counter + 1)
            with suppress(OSError):
                folder.write(name, json.dumps(asdict(holder)).encode(), flush=False)

    thread = threading.Thread(target=beat, name="reader", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with suppress(OSError):
            folder.remove(name)


def held_by_readers(folder: Storage, watch: HeartbeatMonitor, timeout_s: float) -> bool:
    """Whether a process reads the step, by the lease's rule for who is alive.

    Args:
        folder: the step's folder.
        watch: kept between calls, so that it sees whether the counter of a reader on another host moves.
        timeout_s: after which such a reader is dead.
    """
    # Every one is looked at, so that the monitor times all of them from now on.
    lives = [life_of_reader(folder, name, watch, timeout_s) for name in folder.names() if is_reader_lock(name)]
    return any(life is not Liveness.dead for life in lives)


def is_reader_lock(name: str) -> bool:
    """Whether a file in a step's folder is a reader's lock."""
    return name.startswith(_PREFIX) and name.endswith(_SUFFIX)


def life_of_reader(folder: Storage, name: str, watch: HeartbeatMonitor, timeout_s: float) -> Liveness:
    """Whether the reader that a lock names is alive: unknown until its counter has not moved for `timeout_s`.

    What is no lock of any version's (another kind of file, another document) has no reader. One that must not be read
    may have.
    """
    try:
        holder = read_document(folder.read(name, LOCK_BYTES), LeaseRecord)
    except (FileNotFoundError, DocumentError):
        return Liveness.dead
    except OSError as error:
        return Liveness.dead if is_no_file(error) else Liveness.unknown
    life, still_s = life_of(holder, this_process()), watch.idle_seconds(holder)
    return Liveness.dead if life is Liveness.unknown and still_s >= timeout_s else life
