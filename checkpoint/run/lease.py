"""The lease: one writer per checkpoint folder, written beside the bytes that it protects.

On one host a holder is alive as long as its process is. From elsewhere it is alive as long as its counter moves,
watched on the waiter's own clock: no file's time and no two clocks are ever compared. Takeovers are numbered, and a
number can be created once: of several that try, one wins, and the one taken over sees a higher number than its own.

A listing may be late, so that what it leaves out proves nothing: a lease is read by its name.
"""

import errno
import json
import logging
import re
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from typing import final

from regrow.checkpoint.documents import DocumentError, read_document
from regrow.checkpoint.errors import CheckpointError
from regrow.checkpoint.format.step_name import is_leftover, parse_step_name
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

# No leading zeros: a number has one name. A longer one was never reached by counting.
_NAME = re.compile(r"lease-([1-9][0-9]{0,14})\.json")
_LAST_NUMBER = 10**15 - 1
# So many beats fit into the time after which a silent holder is taken for dead.
_BEATS = 6
_POLL_S = 0.1
# The most that `checkpoint.lease_timeout_s` may be, so that a holder's own timeout counts up to here.
LONGEST_TIMEOUT_S = 3600.0
# A silent holder is waited for up to so many times the waiter's own timeout.
_PATIENCE = 10
# How often a lease is looked for that is listed but not there, before it counts as one that cannot be read.
_LOOKS = 3


class LeaseHeldError(CheckpointError):
    """Another process writes into this folder."""


class LeaseLostError(CheckpointError):
    """Another process has taken this folder over, or its lease was removed."""


class Standing(Enum):
    """What has become of a lease."""

    held = "held"
    taken = "taken"
    removed = "removed"


@dataclass(frozen=True, kw_only=True, slots=True)
class FencingToken:
    """A lease as other processes of the same run know it.

    Attributes:
        number: of the takeover.
        token: of the holder.
    """

    number: int
    token: str

    def standing(self, folder: Storage) -> Standing:
        """Whether the lease is this one's: another's only where a higher number or another token is *seen*.

        Raises:
            OSError: the storage cannot say.
        """
        try:
            if max(_numbers(folder), default=0) > self.number:
                return Standing.taken
            token = _read_lease(folder, self.number).token
        except (FileNotFoundError, NotADirectoryError):
            return Standing.removed
        if token not in (self.token, _unreadable(self.number).token):
            return Standing.taken
        # Its successor may be there before it is listed.
        with suppress(FileNotFoundError):
            _read_lease(folder, self.number + 1)
            return Standing.taken
        return Standing.held

    def is_held(self, folder: Storage) -> bool:
        """Whether the newest lease is still this one."""
        return self.standing(folder) is Standing.held

    def check_not_taken(self, folder: Storage) -> None:
        """For what must not be changed below another writer.

        Raises:
            LeaseLostError: one has taken the folder over.
            OSError: the storage cannot say.
        """
        standing = self.standing(folder)
        if standing is Standing.taken:
            raise LeaseLostError(self.loss(folder, standing))

    def loss(self, folder: Storage, standing: Standing) -> str:
        """The sentence for a lease that is not held any more."""
        if standing is Standing.taken:
            return f"another writer has taken over {folder.url}; this one must stop"
        if _holds_more_than_a_save(folder):
            return (
                f"{folder.url} must keep the lease of the run that writes there, but {_name(self.number)} was "
                "removed; nothing more is saved: start the run again to continue"
            )
        return (
            f"{folder.url} must stay while a run writes there, but was removed or emptied; nothing more is saved: "
            "restore it and start the run again"
        )


def _holds_more_than_a_save(folder: Storage) -> bool:
    """Whether anything is there but a save that is under way, which makes a removed folder again."""
    try:
        names = [name for name in folder.names() if not is_leftover(name)]
        return any(parse_step_name(name) is None or folder.exists(f"{name}/manifest.json") for name in names)
    except OSError:
        return False


def _numbers(folder: Storage) -> list[int]:
    """Of the listed leases."""
    return [int(m[1]) for m in map(_NAME.fullmatch, folder.names()) if m]


def newest_lease(folder: Storage, known: int = 0) -> tuple[int, LeaseRecord | None]:
    """The newest lease's number and holder; (0, None) where there is none.

    Args:
        folder: the checkpoint folder.
        known: a number that is taken, whether or not the listing has it by now.

    Raises:
        OSError: the storage fails, or a lease must not be read.
    """
    listed = 0
    for _ in range(_LOOKS):
        listed = max(_numbers(folder), default=0)
        # Where the newest was removed by the one that took it over in between, the next number is his.
        for number in sorted({known, listed, listed + 1} - {0}, reverse=True):
            with suppress(FileNotFoundError):
                return number, _read_lease(folder, number)
        if not listed:
            return 0, None
    # A link that leads nowhere, or a listing that is late.
    return listed, _unreadable(listed)


def _read_lease(folder: Storage, number: int) -> LeaseRecord:
    """A lease's holder, `_unreadable` where it is no lease: somebody's, until it has stood still for long enough.

    Raises:
        OSError: it cannot be read now, or is not there.
    """
    body = b""
    for look in range(_LOOKS):
        try:
            body = folder.read(_name(number), LOCK_BYTES)
            return read_document(body, LeaseRecord)
        except DocumentError:
            break
        except OSError as error:
            if is_no_file(error):
                break
            # ESTALE: replaced on another host of an NFS while it was opened here.
            if error.errno != errno.ESTALE or look == _LOOKS - 1:
                raise
    return _unreadable(number, body)


def _unreadable(number: int, body: bytes = b"") -> LeaseRecord:
    return LeaseRecord(
        token=f"unreadable-{number}", host="", boot="", namespace="", pid=0, started=0, counter=zlib.crc32(body)
    )


def _name(number: int) -> str:
    return f"lease-{number}.json"


def _encode(holder: LeaseRecord) -> bytes:
    return json.dumps(asdict(holder)).encode()


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
                    # Not written again: where another writer has removed it, his lease has only not come into sight.
                    if time.monotonic() - gone_since < self._timeout_s:
                        continue
                if standing is not Standing.held:
                    log.error("%s", self.ticket.loss(self.folder, standing))
                    self.on_lost()
                    return
                gone_since = None
                self._holder = replace(self._holder, counter=self._holder.counter + 1)
                self.folder.write(_name(self.ticket.number), _encode(self._holder))
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
                self.folder.write(_name(self.ticket.number), _encode(replace(self._holder, released=True)))
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
            self.folder.remove(_name(self.ticket.number))
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
) -> Lease:
    """Makes this process the folder's one writer.

    Args:
        folder: the checkpoint folder; made where it is missing.
        timeout_s: after which a holder that cannot be looked at, and whose counter stands still, is dead.
        what: the folder's run, for the message.
        me: this process, unless told otherwise.
        on_lost: called, in a thread, when another writer has taken over all the same.
        setting: which field names the folder, for the message.

    Raises:
        LeaseHeldError: another process lives and writes there, or may.
        CheckpointError: the folder cannot be listed, read or written.
    """
    contender = _Contender(folder, timeout_s, what, replace(me or this_process(), timeout_s=timeout_s), on_lost)
    try:
        return contender.acquire()
    except OSError as error:
        where = error.filename if isinstance(error.filename, str) else folder.url
        raise CheckpointError(
            f"{setting} must be a folder that can be listed, read and written, but {where} cannot "
            f"({error.strerror or error}); mend it, or choose another {setting}"
        ) from error


@final
class _Contender:
    """Wants the lease; see `acquire_lease` for the arguments."""

    def __init__(
        self, folder: Storage, timeout_s: float, what: str, me: LeaseRecord, on_lost: Callable[[], None]
    ) -> None:
        self._folder, self._timeout_s, self._what, self._me, self._on_lost = folder, timeout_s, what, me, on_lost
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
                if self._folder.create(_name(number + 1), _encode(self._me)):
                    return self._taken(number + 1, holder)
                known = number + 1
                continue
            if not announced:
                log.info("%s is held by %s; waiting to see whether it is alive", self._what, holder)
                announced = True
            time.sleep(min(_POLL_S, self._timeout_s / _BEATS))

    def _may_take(self, number: int, holder: LeaseRecord) -> bool:
        """Whether the holder is gone; false while that is not yet clear; raises where it is not."""
        if number >= _LAST_NUMBER:
            raise CheckpointError(
                f"leases must be numbered by counting, but {self._folder.url} holds {_name(number)}, which leaves no "
                "next one; remove it where no run writes there"
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
                f"run.name must not name a run that is being trained, but {self._what} is held by {holder}; stop it "
                "or choose another run.name"
            )
        most_s = _PATIENCE * self._timeout_s
        if time.monotonic() - self._began >= most_s or (still_s >= self._timeout_s and needed_s > most_s):
            raise LeaseHeldError(
                f"run.name must not name a run that may be being trained, but {self._what} is held by {holder}, "
                f"whose lease must stand still for {needed_s:g} s (its own timeout) to be taken over; try later, "
                f"or remove {_name(number)} in {self._folder.url} where that process has ended"
            )

    def _taken(self, number: int, before: LeaseRecord | None) -> Lease:
        """The lease is written: now what a paused writer could still make valid goes away."""
        folder, ticket = self._folder, FencingToken(number=number, token=self._me.token)
        lease = Lease(folder, ticket, None, self._on_lost, self._me, self._timeout_s)
        try:
            for name in folder.names():
                match = _NAME.fullmatch(name)
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
    """Removes a lease that was taken over; a folder in its place that holds something stays, and hurts nobody."""
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
        return  # its writer, still dying, has just committed or removed it
    try:
        folder.remove(trash_name)
    except OSError as error:
        log.warning("%s in %s cannot be removed now (%s); the next start tries again", trash_name, folder.url, error)
