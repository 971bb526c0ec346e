"""Durable small-file operations: what is written here survives a power cut once the call returns."""

import errno
import json
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from regrow.checkpoint.documents import parse_json
from regrow.checkpoint.processes import process_tag

__all__ = [
    "SMALL_FILE_BYTES",
    "fsync_folder",
    "fsync_path",
    "naming",
    "open_regular",
    "read_json",
    "read_regular",
    "temporary_path",
    "write_json",
]

# No document that is read whole is larger: the manifests of 16,384 ranks' largest models are far below.
SMALL_FILE_BYTES = 1 << 30


def open_regular(path: Path) -> int:
    """A descriptor for reading a regular file.

    A named pipe would keep the reader waiting, and a device never ends.

    Raises:
        OSError: it cannot be opened, or is another kind of file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    kind = os.fstat(descriptor).st_mode
    if stat.S_ISREG(kind):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "Not a regular file", str(path))


def read_regular(path: Path, limit: int = SMALL_FILE_BYTES) -> bytes:
    """The bytes of a regular file.

    Args:
        path: the file.
        limit: bytes; a larger file is refused before any of it is read.

    Raises:
        OSError: it cannot be read, is another kind of file, or is too large (EFBIG).
    """
    with open(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"File too large ({size} bytes; at most {limit} are expected)", str(path))
        return file.read(limit + 1)[:limit]


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives an error of writing or flushing, which knows a descriptor alone, the path of the file."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def fsync_path(path: Path) -> None:
    """Flushes a file's bytes to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(path: Path) -> None:
    """Flushes a folder's entries (names made, renamed or removed in it) to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_path(path: Path) -> Path:
    """A new name beside `path` for what will be renamed to it; it says whose it is, so that it can be cleared."""
    return path.with_name(f".{path.name}.{process_tag()}.{uuid.uuid4().hex[:8]}.tmp")


def write_json(path: Path, value: Any) -> None:
    """Replaces `path` by `value` as JSON: readers see the old file or the new one, whole."""
    temporary = temporary_path(path)
    try:
        with naming(path), temporary.open("w") as out:
            json.dump(value, out, indent=1)
            out.write("\n")
            out.flush()
            os.fsync(out.fileno())
        temporary.rename(path)
    except BaseException:
        with suppress(OSError):  # the next start removes what is left
            temporary.unlink(missing_ok=True)
        raise
    with naming(path):
        fsync_folder(path.parent)


def read_json(path: Path) -> Any:
    """The value in `path`.

    Raises:
        OSError: it cannot be read, or is not a regular file.
        DocumentError: it is no JSON.
    """
    return parse_json(read_regular(path))
