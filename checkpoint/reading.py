"""Locks of readers: a step that is being read is not removed."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace

from checkpoint.lease import Holder, Life, Watch, life_of, this_process
from checkpoint.storage.base import Storage

__all__ = ["held_by_readers", "reading"]

_PREFIX = "reader-"
_BEAT_S = 5.0


@contextmanager
def reading(place: Storage) -> Iterator[None]:
    """Keeps a step from being removed by its run's retention while it is read.

    A place that cannot be written (somebody else's checkpoint, a read-only mount) is read without a lock.
    """
    me, done = this_process(), threading.Event()
    name = f"{_PREFIX}{me.token}.json"
    try:
        place.write(name, json.dumps(asdict(me)).encode(), flush=False)
    except OSError:
        yield
        return

    def beat() -> None:
        holder = me
        while not done.wait(_BEAT_S):
            holder = replace(holder, counter=holder.counter + 1)
            with suppress(OSError):
                place.write(name, json.dumps(asdict(holder)).encode(), flush=False)

    thread = threading.Thread(target=beat, name="reader", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with suppress(OSError):
            place.remove(name)


def held_by_readers(place: Storage, watch: Watch, timeout_s: float) -> bool:
    """Whether somebody reads the step, by the lease's rule for who is alive.

    Args:
        place: the step's folder.
        watch: kept from question to question, so that a reader that cannot be looked at is seen to stand still.
        timeout_s: after which such a reader is dead.
    """
    me = this_process()
    for name in place.names():
        if not name.startswith(_PREFIX):
            continue
        try:
            holder = Holder(**json.loads(place.read(name)))
        except (OSError, ValueError, TypeError):
            continue
        life = life_of(holder, me)
        still = watch.still_for(holder)
        if life is Life.alive or (life is Life.unknown and still < timeout_s):
            return True
    return False
