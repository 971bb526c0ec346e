"""Folders of a file system: large aligned writes past the page cache where it takes them, flushes, atomic renames."""

import errno
import logging
import mmap
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import final

from regrow.checkpoint.config import DirectIo
from regrow.checkpoint.files import SMALL_FILE_BYTES, fsync_folder, open_regular, read_regular, temporary_path
from regrow.checkpoint.storage.base import PAGE, RangeReader, Storage

__all__ = ["LocalStorage", "takes_direct_io", "write_all"]

log = logging.getLogger(__name__)

_REQUEST_BYTES = 1 << 20


def takes_direct_io(folder: Path) -> bool:
    """Whether files below `folder` can be written past the page cache; found out by writing one page."""
    probe = folder / f".direct-{uuid.uuid4().hex[:8]}"
    page = mmap.mmap(-1, PAGE)
    try:
        descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o644)
        try:
            # Nameless from here on: a kill leaves nothing.
            probe.unlink()
            return os.pwrite(descriptor, page, 0) == PAGE
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return False
        raise
    finally:
        probe.unlink(missing_ok=True)


def write_all(descriptor: int, data: memoryview, offset: int, *, aligned: bool = False) -> None:
    """Writes all of `data`, however much the file system takes at a time.

    Args:
        descriptor: of the file.
        data: all of it.
        offset: in the file.
        aligned: a short write may end within a page, but the next one must begin on one (past the page cache).

    Raises:
        OSError: the file system takes no more.
    """
    done = 0
    while done < len(data):
        written = os.pwrite(descriptor, data[done:], offset + done)
        if aligned and written < len(data) - done:
            written -= written % PAGE
        if written == 0:
            raise OSError(errno.ENOSPC, "the file system takes no more")
        done += written


@final
class _Descriptor(RangeReader):
    request_bytes = _REQUEST_BYTES

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def read_into(self, offset: int, memory: memoryview) -> int:
        done = 0
        while done < len(memory):
            got = os.preadv(self._descriptor, [memory[done:]], offset + done)
            if got == 0:
                break
            done += got
        return done

    def read_into_all(self, offset: int, memories: Sequence[memoryview]) -> int:
        done = os.preadv(self._descriptor, memories, offset)
        position = 0
        for memory in memories:
            # Usually everything has been read by now.
            if done < position + len(memory):
                done += self.read_into(offset + done, memory[done - position :])
                if done < position + len(memory):
                    break
            position += len(memory)
        return done


@final
class LocalStorage(Storage):
    """A folder on a disk or a shared file system.

    Args:
        path: need not exist.
        direct_io: whether large writes go past the page cache; `auto` tries it once, where the first one goes.
    """

    renames = True
    is_remote = False
    streams = 4
    request_bytes = _REQUEST_BYTES

    def __init__(self, path: Path, direct_io: DirectIo = DirectIo.auto) -> None:
        self.path = path
        self.url = str(path)
        self._direct_io = direct_io
        # Shared with the folders below: decided once.
        self._decided: list[bool] = [] if direct_io is DirectIo.auto else [direct_io is DirectIo.on]

    def child(self, name: str) -> "LocalStorage":
        below = LocalStorage(self.path / name, self._direct_io)
        below._decided = self._decided
        return below

    def parent(self) -> "LocalStorage | None":
        path = self.path.absolute()
        return LocalStorage(path.parent, self._direct_io) if path.parent != path else None

    def make(self) -> None:
        missing = self.path
        while not missing.parent.exists():
            missing = missing.parent
        self.path.mkdir(parents=True, exist_ok=True)
        fsync_folder(missing.parent)

    def names(self) -> list[str]:
        try:
            return sorted(p.name for p in self.path.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def sizes(self) -> dict[str, int]:
        try:
            with os.scandir(self.path) as entries:
                found = list(entries)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        sizes = {}
        for entry in found:
            # Another process' lock or temporary file may be gone by now.
            with suppress(FileNotFoundError):
                if entry.is_file():
                    sizes[entry.name] = entry.stat().st_size
        return sizes

    def exists(self, name: str) -> bool:
        return (self.path / name).exists()

    def read(self, name: str, limit: int = SMALL_FILE_BYTES) -> bytes:
        return read_regular(self.path / name, limit)

    @contextmanager
    def open(self, name: str) -> Iterator[RangeReader]:
        descriptor = open_regular(self.path / name)
        try:
            yield _Descriptor(descriptor)
        finally:
            os.close(descriptor)

    def write(self, name: str, data: bytes, *, flush: bool = True) -> None:
        try:
            self._replace(name, data)
        except FileNotFoundError:
            # The temporary file was taken for what a killed process left, and removed.
            self._replace(name, data)
        if flush:
            self.flush()

    def _replace(self, name: str, data: bytes) -> None:
        temporary = self._temporary(name, data)
        try:
            temporary.rename(self.path / name)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    def create(self, name: str, data: bytes) -> bool:
        temporary = self._temporary(name, data)
        try:
            # A link, unlike a rename, fails where the name is taken; on NFS too.
            os.link(temporary, self.path / name)
        except FileExistsError:
            return False
        except FileNotFoundError:
            # Taken for what a killed process left, and removed; whoever did that may have the name by now.
            return self._create_without_links(name, data)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK):
                raise
            return self._create_without_links(name, data)
        finally:
            temporary.unlink(missing_ok=True)
        self.flush()
        return True

    def _create_without_links(self, name: str, data: bytes) -> bool:
        """For file systems that know no links: exclusive, but a reader may see the file while it is written."""
        try:
            descriptor = os.open(self.path / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        try:
            write_all(descriptor, memoryview(data), 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self.flush()
        return True

    def _temporary(self, name: str, data: bytes) -> Path:
        """A durable file beside `name`, for a rename or a link."""
        path = temporary_path(self.path / name)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            write_all(descriptor, memoryview(data), 0)
            os.fsync(descriptor)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        return path

    def stream(self, name: str, size: int, windows: Iterator[memoryview]) -> None:
        if not self._decided:
            self._decided.append(takes_direct_io(self.path))
            log.info("checkpoints are written %s the page cache", "past" if self._decided[0] else "through")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | (os.O_DIRECT if self._decided[0] else 0)
        descriptor = os.open(self.path / name, flags, 0o644)
        try:
            position = 0
            for window in windows:
                write_all(descriptor, window, position, aligned=self._decided[0])
                position += len(window)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def flush(self) -> None:
        fsync_folder(self.path)

    def move(self, name: str, target: str) -> None:
        goal = self.path / target
        goal.parent.mkdir(parents=True, exist_ok=True)
        (self.path / name).rename(goal)
        self.flush()

    def remove(self, name: str) -> None:
        path = self.path / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def free_bytes(self) -> int | None:
        return shutil.disk_usage(self.path).free
