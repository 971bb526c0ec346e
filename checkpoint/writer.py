"""Streams a file image to the disk: large aligned writes past the page cache where the file system takes them."""

import errno
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from checkpoint.hashing import block_hashes
from checkpoint.image import FileImage
from checkpoint.plan import PAGE

__all__ = ["takes_direct_io", "write_all", "write_image"]

log = logging.getLogger(__name__)

_WRITE_BYTES = 8 << 20


def takes_direct_io(folder: Path) -> bool:
    """Whether files below `folder` can be written past the page cache; found out by writing one page."""
    import mmap

    probe = folder / f".direct-{os.getpid()}"
    page = mmap.mmap(-1, PAGE)
    try:
        descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o644)
        try:
            return os.pwrite(descriptor, page, 0) == PAGE
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return False
        raise
    finally:
        probe.unlink(missing_ok=True)


def write_image(path: Path, image: FileImage, *, direct: bool, pool: ThreadPoolExecutor) -> dict[str, list[str]]:
    """Writes the image, durable when this returns, and hashes it meanwhile.

    Args:
        path: the new file.
        image: must not change before this returns.
        direct: past the page cache.
        pool: hashes while this thread writes.

    Returns:
        The block hashes of each item, by name.

    Raises:
        OSError: the disk is full or fails.
    """
    memory = image.memory()
    hashes = {
        item.chunk.name: pool.submit(block_hashes, memory[item.data : item.data + item.data_bytes])
        for item in image.plan.items
    }
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | (os.O_DIRECT if direct else 0)
    descriptor = os.open(path, flags, 0o644)
    try:
        for start in range(0, image.size, _WRITE_BYTES):
            write_all(descriptor, memory[start : min(start + _WRITE_BYTES, image.size)], start)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
        # The image may be used again only when nobody reads it any more.
        found = {name: future.result() for name, future in hashes.items()}
    return found


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Writes all of `data`, however much the file system takes at a time; raises OSError where it takes nothing."""
    done = 0
    while done < len(data):
        written = os.pwrite(descriptor, data[done:], offset + done)
        # A short write past the page cache may end within a page; what follows must be aligned again.
        done += written - written % PAGE if written < len(data) - done else written
        if written == 0:
            raise OSError(errno.EIO, "the file system wrote nothing")
