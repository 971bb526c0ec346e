"""What ranks tell each other about themselves while something takes long: a small file each, beside the run.

In healthy training none is written. Each has its size from the beginning and is written in place, so that a disk that
has filled up meanwhile takes it.
"""

import json
import os
import re
import shutil
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, final

import msgspec
from msgspec import Meta

from regrow.checkpoint.documents import Count, DocumentError, read_document
from regrow.checkpoint.files import open_regular
from regrow.checkpoint.processes import process_stat, tag_is_local
from regrow.trainer.phase import Phase

__all__ = ["Member", "Note", "Notes", "clear_old_notes", "end_process"]

_SIZE = 1024
_NAME = re.compile(r"live-[0-9a-f]{8}")
_Text = Annotated[str, Meta(max_length=400)]


class Note(msgspec.Struct, frozen=True):
    """What a rank says of itself.

    Attributes:
        beat: another number each time.
        step: the last one that it has done.
        phase: a `Phase`'s name, or `compiling`.
        since_s: seconds that it has been there.
        collective: that its main thread is in; empty: none.
        place: of its main thread, in words.
        hangs: whether it has found that the step hangs.
    """

    beat: Count
    step: Count
    phase: _Text
    since_s: float
    collective: _Text
    place: _Text
    hangs: bool = False

    @property
    def is_regular(self) -> bool:
        """Whether it is in a part of each step."""
        return self.phase in Phase.__members__ and Phase[self.phase].is_regular


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A rank's process.

    Attributes:
        rank: among all.
        host: its name.
        pid: on its host.
        tag: see `process_tag`.
    """

    rank: int
    host: str
    pid: int
    tag: str

    @property
    def is_here(self) -> bool:
        """Whether it runs on this host, as this process sees it."""
        return tag_is_local(self.tag)


def end_process(member: Member) -> bool:
    """Kills a rank of this host with SIGKILL, which ends a stopped process too; false where it has ended already."""
    started = int(member.tag.rpartition("-")[2])
    try:
        # Held by the descriptor, the number cannot become another process' after it was looked at.
        descriptor = os.pidfd_open(member.pid)
    except OSError:
        return False
    try:
        if not member.is_here or process_stat(member.pid)[1] != started:
            return False
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


@final
class Notes:
    """This rank's note, and the others'.

    Args:
        folder: of this start's notes, on a storage that all ranks share.
        rank: this one.
        world_size: of all.

    Attributes:
        token: of this start, the same on all ranks.
    """

    def __init__(self, folder: Path, rank: int, world_size: int) -> None:
        self._folder, self._rank, self._world_size = folder, rank, world_size
        self.token = folder.name.removeprefix("live-")
        self._beat = 0
        self._file: int | None = None
        self._seen: dict[int, tuple[int, float]] = {}
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path(rank), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            os.pwrite(self._file, b" " * _SIZE, 0)

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}"

    def publish(self, note: Note) -> None:
        """Replaces this rank's note; its beat is set here."""
        self._beat += 1
        if self._file is not None:
            body = json.dumps({**msgspec.structs.asdict(note), "beat": self._beat}).encode()
            with suppress(OSError):
                os.pwrite(self._file, body[:_SIZE].ljust(_SIZE), 0)

    def read(self) -> dict[int, Note]:
        """The last notes of all other ranks that have ever written one."""
        found = {}
        for rank in range(self._world_size):
            note = self._read(rank) if rank != self._rank else None
            if note is not None:
                found[rank] = note
                if self._seen.get(rank, (-1, 0.0))[0] != note.beat:
                    self._seen[rank] = note.beat, time.monotonic()
        return found

    def _read(self, rank: int) -> Note | None:
        with suppress(OSError, DocumentError):
            with os.fdopen(open_regular(self._path(rank)), "rb") as file:
                body = file.read(_SIZE).strip()
            return read_document(body, Note) if body else None
        return None

    def heard(self, rank: int, within_s: float) -> bool:
        """Whether a rank has written a new note lately, by this rank's clock alone."""
        at = self._seen.get(rank)
        return at is not None and time.monotonic() - at[1] <= within_s

    def close(self) -> None:
        """Takes this rank's note away; the last rank to leave takes the folder."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        with suppress(OSError):
            self._path(self._rank).unlink(missing_ok=True)
            self._folder.rmdir()


def clear_old_notes(folder: Path) -> None:
    """Removes the notes of earlier starts, which were killed."""
    with suppress(OSError):
        for path in folder.iterdir():
            if _NAME.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)
