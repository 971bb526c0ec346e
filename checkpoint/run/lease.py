"""The lease: one writer per checkpoint folder, written beside the bytes that it protects.

On one host a holder is alive as long as its process is. From elsewhere it is alive as long as its counter moves,
watched on the waiter's own clock: no file's time and no two clocks are ever compared. Takeovers are numbered, and a
number can be created once: of several that try, one wins, and the one taken over sees a higher number than its own.

A listing may be late, so that what it leaves out proves nothing: a lease is read by its name.
"""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import final

from regrow.checkpoint.errors import CheckpointError
from regrow.checkpoint.format.step_name import is_leftover
from regrow.checkpoint.run.holder import (
    HeartbeatMonitor,
    LeaseRecord,
    Liveness,
    life_of,
    this_process,
)
from regrow.checkpoint.run.lease_file import (
    LAST_NUMBER,
    LEASE_NAME,
    FencingToken,
    LeaseHeldError,
    LeaseLostError,
    Standing,
    encode_lease,
    lease_name,
    newest_lease,
)
from regrow.checkpoint.storage.base import Storage

__all__ = [
    "LONGEST_TIMEOUT_S",
    "FencingToken",
    "HeartbeatMonitor",
    "Lease",
    "LeaseHeldError",
    "LeaseLostError",
    "LeaseRecord",
    "Liveness",
    "Standing",
    "acquire_lease",
    "life_of",
    "newest_lease",
    "this_process",
]

log = logging.getLogger(__name__)

# This many beats fit into the time after which a silent holder counts as dead.
_BEATS = 6
_POLL_S = 0.1
# The most that `checkpoint.lease_timeout_s` may be, so that a holder's own timeout counts up to here.
LONGEST_TIMEOUT_S = 3600.0
# A silent holder is waited for at most this many times the waiter's own timeout.
_PATIENCE = 10


@dataclass(slots=True)
class Lease:
    """A lease that this process holds; a thread keeps its counter moving.

    Attributes:
        folder: the checkpoint folder.
        ticket: for the processes that write.
        seized: the holder before had not released it: it was killed, or was silent.
        on_lost: called in the lease's thread when another writer has taken over, or when the lease has been gone for
            longer than a storage may hide it.
    """

    folder: Storage
    ticket: FencingToken
    seized: LeaseRecord | None
    on_lost: Callable[[], None]
    _holder: LeaseRecord
    _timeout_s: float
    _done: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Begins to move the counter."""
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        gone_since: float | None = None
        while not self._done.wait(self._timeout_s / _BEATS):
            try:
                standing = self.ticket.standing(self.folder)
                if standing is Standing.removed:
                    gone_since = time.monotonic() if gone_since is None else gone_since
                    # Not written again: where another writer has removed it, its lease may only not be visible yet.
                    if time.monotonic() - gone_since < self._timeout_s:
                        continue
                if standing is not Standing.held:
                    log.error("%s", self.ticket.loss(self.folder, standing))
                    self.on_lost()
                    return
                gone_since = None
                self._holder = replace(self._holder, counter=self._holder.counter + 1)
                self.folder.write(lease_name(self.ticket.number), encode_lease(self._holder))
            except OSError as error:
                log.warning("the lease in %s cannot be renewed: %s", self.folder.url, error)

    def _stop(self) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    def release(self) -> None:
        """Lets the next writer in at once."""
        self._stop()
        try:
            if self.ticket.is_held(self.folder):
                self.folder.write(lease_name(self.ticket.number), encode_lease(replace(self._holder, released=True)))
        except OSError as error:
            log.warning("the lease in %s cannot be released: %s", self.folder.url, error)

    def withdraw(self) -> bool:
        """Removes the lease of a folder that this process has written nothing into, and no other's.

        Returns:
            Whether it was still this process' own.
        """
        self._stop()
        try:
            if not self.ticket.is_held(self.folder):
                return False
            self.folder.remove(lease_name(self.ticket.number))
        except OSError as error:
            log.warning("the lease in %s cannot be removed: %s", self.folder.url, error)
            return False
        return True


def acquire_lease(
    folder: Storage,
    timeout_s: float,
    what: str,
    me: LeaseRecord | None = None,
    on_lost: Callable[[], None] = lambda: None,
    setting: str = "checkpoint.folder",
    remedy: str = "stop it or choose another run.name",
) -> Lease:
    """Makes this process the folder's one writer.

    Args:
        folder: the checkpoint folder; made where it is missing.
        timeout_s: after which a holder on another host whose counter has not moved counts as dead.
        what: the folder's run, for the message.
        me: this process, unless told otherwise.
        on_lost: called, in a thread, when another writer has taken over all the same.
        setting: which field names the folder, for the message.
        remedy: what to do where another process writes there, for the message.

    Raises:
        LeaseHeldError: another process lives and writes there, or may.
        CheckpointError: the folder cannot be listed, read or written.
    """
    contender = _Contender(
        folder, timeout_s, what, replace(me or this_process(), timeout_s=timeout_s), on_lost, remedy
    )
    try:
        return contender.acquire()
    except OSError as error:
        where = error.filename if isinstance(error.filename, str) else folder.url
        raise CheckpointError(
            f"{setting} must be a folder that can be listed, read and written, but {where} cannot "
            f"({error.strerror or error}); make it so, or choose another {setting}"
        ) from error


@final
class _Contender:
    """A process that waits for the lease; see `acquire_lease` for the arguments."""

    def __init__(
        self,
        folder: Storage,
        timeout_s: float,
        what: str,
        me: LeaseRecord,
        on_lost: Callable[[], None],
        remedy: str,
    ) -> None:
        self._folder, self._timeout_s, self._what, self._me, self._on_lost = folder, timeout_s, what, me, on_lost
        self._remedy = remedy
        self._watch, self._began = HeartbeatMonitor(), time.monotonic()

    def acquire(self) -> Lease:
        """Waits until the lease is this process'."""
        known, announced = 0, False
        self._folder.make()
        while True:
            number, holder = newest_lease(self._folder, known)
            if holder is not None and holder.token == self._me.token:
                # Written, although the storage's answer was lost and its retry was refused.
                return self._taken(number, None)
            if holder is None or self._may_take(number, holder):
                # A launcher that was refused may just have removed the empty folder.
                self._folder.make()
                if self._folder.create(lease_name(number + 1), encode_lease(self._me)):
                    return self._taken(number + 1, holder)
                known = number + 1
                continue
            if not announced:
                log.info("%s is held by %s; waiting to see whether it is alive", self._what, holder)
                announced = True
            time.sleep(min(_POLL_S, self._timeout_s / _BEATS))

    def _may_take(self, number: int, holder: LeaseRecord) -> bool:
        """Whether the holder is gone; false while that is not yet clear; raises where it is not."""
        if number >= LAST_NUMBER:
            raise CheckpointError(
                f"leases must be numbered by counting, but {self._folder.url} holds {lease_name(number)}, which "
                "leaves no next one; remove it where no run writes there"
            )
        life = life_of(holder, self._me)
        requeued = holder.job is not None and holder.job == self._me.job and self._me.restart > holder.restart
        if life is Liveness.dead or (requeued and life is Liveness.unknown):
            return True
        moved, still_s = self._watch.has_moved(holder), self._watch.idle_seconds(holder)
        needed_s = max(self._timeout_s, min(holder.timeout_s, LONGEST_TIMEOUT_S))
        if life is Liveness.unknown and still_s >= needed_s:
            return True
        if not requeued:
            self._refuse(number, holder, needed_s, still_s, is_alive=life is Liveness.alive or moved)
        return False

    def _refuse(self, number: int, holder: LeaseRecord, needed_s: float, still_s: float, *, is_alive: bool) -> None:
        """Raises where the holder lives, or where it would have to be waited for too long."""
        if is_alive:
            raise LeaseHeldError(
                f"{self._what} is held by {holder}, and only one process may write there; {self._remedy}"
            )
        most_s = _PATIENCE * self._timeout_s
        if time.monotonic() - self._began >= most_s or (still_s >= self._timeout_s and needed_s > most_s):
            raise LeaseHeldError(
                f"{self._what} is held by {holder}, whose lease must not change for "
                f"{needed_s:g} s (its own timeout) before it can be taken over; try later, or remove "
                f"{lease_name(number)} in {self._folder.url} where that process has ended"
            )

    def _taken(self, number: int, before: LeaseRecord | None) -> Lease:
        """The lease is written: now what a paused writer could still make valid goes away."""
        folder, ticket = self._folder, FencingToken(number=number, token=self._me.token)
        lease = Lease(folder, ticket, None, self._on_lost, self._me, self._timeout_s)
        try:
            for name in folder.names():
                match = LEASE_NAME.fullmatch(name)
                if match and int(match[1]) < number:
                    _remove_lease(folder, name)
                elif is_leftover(name) and ".partial-" in name:
                    _withdraw_partial(folder, name, self._me)
        except OSError:
            lease.release()
            raise
        lease.seized = before if before is not None and not before.released else None
        if lease.seized is not None:
            log.info("took %s over from %s", folder.url, lease.seized)
        lease.start()
        return lease


def _remove_lease(folder: Storage, name: str) -> None:
    """Removes a lease that was taken over; a folder in its place that holds something stays, and does no harm."""
    with suppress(OSError):
        # What some storages list below a file is the file.
        if set(folder.child(name).names()) - {name}:
            return
    try:
        folder.remove(name)
    except OSError as error:
        log.warning("%s in %s cannot be removed now: %s", name, folder.url, error)


def _withdraw_partial(folder: Storage, name: str, me: LeaseRecord) -> None:
    # Renamed first: half of what the old writer has open must not keep the name that it will rename.
    trash_name = f"{name.split('.')[0]}.removing-{me.token}"
    try:
        folder.move(name, trash_name)
    except FileNotFoundError:
        return  # its writer was still ending, and has just committed or removed it
    try:
        folder.remove(trash_name)
    except OSError as error:
        log.warning("%s in %s cannot be removed now (%s); the next start tries again", trash_name, folder.url, error)
