"""A lease's file: its name, what it says of its holder, and whether another process has taken it over."""

import errno
import json
import re
import zlib
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import Enum

from regrow.checkpoint.documents import DocumentError, read_document
from regrow.checkpoint.errors import CheckpointError
from regrow.checkpoint.format.step_name import is_leftover, parse_step_name
from regrow.checkpoint.run.holder import LOCK_BYTES, LeaseRecord, is_no_file
from regrow.checkpoint.storage.base import COMMIT_FILE, Storage

__all__ = [
    "LAST_NUMBER",
    "LEASE_NAME",
    "FencingToken",
    "LeaseHeldError",
    "LeaseLostError",
    "Standing",
    "encode_lease",
    "lease_name",
    "lease_numbers",
    "newest_lease",
    "read_lease",
    "unreadable_lease",
]

# No leading zeros: a number has one name. A longer one was never reached by counting.
LEASE_NAME = re.compile(r"lease-([1-9][0-9]{0,14})\.json")
LAST_NUMBER = 10**15 - 1
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
            if max(lease_numbers(folder), default=0) > self.number:
                return Standing.taken
            token = read_lease(folder, self.number).token
        except (FileNotFoundError, NotADirectoryError):
            return Standing.removed
        if token not in (self.token, unreadable_lease(self.number).token):
            return Standing.taken
        # Its successor may be there before it is listed.
        with suppress(FileNotFoundError):
            read_lease(folder, self.number + 1)
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
            return f"another writer has taken over {folder.url}; this process must stop"
        if _holds_more_than_a_save(folder):
            return (
                f"{folder.url} must keep the lease of the run that writes there, but {lease_name(self.number)} was "
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
        return any(parse_step_name(name) is None or folder.exists(f"{name}/{COMMIT_FILE}") for name in names)
    except OSError:
        return False


def lease_numbers(folder: Storage) -> list[int]:
    """Of the listed leases."""
    return [int(m[1]) for m in map(LEASE_NAME.fullmatch, folder.names()) if m]


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
        listed = max(lease_numbers(folder), default=0)
        # Where the newest was removed by the one that took it over in between, the next number is its.
        for number in sorted({known, listed, listed + 1} - {0}, reverse=True):
            with suppress(FileNotFoundError):
                return number, read_lease(folder, number)
        if not listed:
            return 0, None
    # A link that leads nowhere, or a listing that is late.
    return listed, unreadable_lease(listed)


def read_lease(folder: Storage, number: int) -> LeaseRecord:
    """A lease's holder; `unreadable_lease` where it is no lease, which counts as held while it changes.

    Raises:
        OSError: it cannot be read now, or is not there.
    """
    body = b""
    for look in range(_LOOKS):
        try:
            body = folder.read(lease_name(number), LOCK_BYTES)
            return read_document(body, LeaseRecord)
        except DocumentError:
            break
        except OSError as error:
            if is_no_file(error):
                break
            # ESTALE: replaced on another host of an NFS while it was opened here.
            if error.errno != errno.ESTALE or look == _LOOKS - 1:
                raise
    return unreadable_lease(number, body)


def unreadable_lease(number: int, body: bytes = b"") -> LeaseRecord:
    """Stands for a lease that is there and cannot be read: another body counts as another heartbeat."""
    return LeaseRecord(
        token=f"unreadable-{number}", host="", boot="", namespace="", pid=0, started=0, counter=zlib.crc32(body)
    )


def lease_name(number: int) -> str:
    """The file of a takeover, beside the steps."""
    return f"lease-{number}.json"


def encode_lease(holder: LeaseRecord) -> bytes:
    """The body of a lease's file."""
    return json.dumps(asdict(holder)).encode()
