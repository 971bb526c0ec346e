"""What the engine asks of a place for checkpoints."""

import errno
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import final

from regrow.checkpoint.files import SMALL_FILE_BYTES

__all__ = ["COMMIT_FILE", "PAGE", "RangeReader", "RemoteFile", "Storage", "as_os_error", "too_large"]

# What direct writes are aligned to, in memory and in the file, in bytes.
PAGE = 4096
# The file that makes a folder a complete step where folders cannot be renamed: written last, removed first.
COMMIT_FILE = "manifest.json"


class RangeReader(ABC):
    """An open file.

    Attributes:
        request_bytes: see `Storage`.
    """

    request_bytes: int = 1 << 23

    @abstractmethod
    def read_into(self, offset: int, memory: memoryview) -> int:
        """Fills memory from the file's bytes at `offset`; returns how many there were, fewer only at its end."""

    @abstractmethod
    def read_into_all(self, offset: int, memories: Sequence[memoryview]) -> int:
        """Fills pieces of memory, one after the other, from the file's bytes at `offset`, by one request."""


@final
class RemoteFile(RangeReader):
    """A file of which ranges are asked for one by one.

    Args:
        read_range: given offset and length, those bytes; fewer at the file's end.
    """

    def __init__(self, read_range: Callable[[int, int], bytes | memoryview]) -> None:
        self._read_range = read_range

    def read_into(self, offset: int, memory: memoryview) -> int:
        return self.read_into_all(offset, [memory])

    def read_into_all(self, offset: int, memories: Sequence[memoryview]) -> int:
        data = memoryview(self._read_range(offset, sum(len(m) for m in memories)))
        position = 0
        for memory in memories:
            part = data[position : position + len(memory)]
            memory[: len(part)] = part
            position += len(part)
        return len(data)


def too_large(url: str, size: int, limit: int) -> OSError:
    """The error for a file that is larger than what is expected of it."""
    return OSError(errno.EFBIG, f"File too large ({size} bytes; at most {limit} are expected)", url)


@contextmanager
def as_os_error(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turns a library's own errors into the OSError that a disk would raise.

    Args:
        what: the place, for the message.
        kinds: the library's errors; OSErrors among them pass as they are.
    """
    try:
        yield
    except OSError:
        raise
    except kinds as error:
        # The first line says it; what follows is the request.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise OSError(errno.EIO, f"{what}: {lines[0][:300]}") from error


class Storage(ABC):
    """A folder. Names are relative to it, with `/` between.

    All methods raise OSError where the place fails, and FileNotFoundError where a name is not there.

    Attributes:
        url: what a person would type.
        renames: whether `move` of a folder is one atomic step. Where it is not, a step is written under its final
            name and its manifest, written last, makes it valid.
        is_remote: whether threads that read wait for a network rather than use a core.
        streams: so many reads at once are faster than fewer.
        request_bytes: what is asked for at a time, a power of two from 1 MiB on; little where asking costs little:
            it is hashed while a core's cache has it.
    """

    url: str
    renames: bool
    is_remote: bool = True
    streams: int = 8
    request_bytes: int = 1 << 23

    @abstractmethod
    def child(self, name: str) -> "Storage":
        """A folder below this one; need not exist."""

    @abstractmethod
    def parent(self) -> "Storage | None":
        """The folder above this one; None at the top."""

    @abstractmethod
    def make(self) -> None:
        """Makes the folder and those above it."""

    @abstractmethod
    def names(self) -> list[str]:
        """What lies right below, sorted; empty where the folder is not there."""

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """The files right below, with their bytes; empty where the folder is not there."""

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether there is such a file or folder."""

    @abstractmethod
    def read(self, name: str, limit: int = SMALL_FILE_BYTES) -> bytes:
        """A small file; OSError (EFBIG) where it is larger than `limit` bytes, before any of it is kept."""

    @abstractmethod
    def open(self, name: str) -> AbstractContextManager[RangeReader]:
        """A file to read ranges of."""

    @abstractmethod
    def write(self, name: str, data: bytes, *, flush: bool = True) -> None:
        """Replaces a small file as a whole; its bytes are durable on return.

        Args:
            name: the file.
            data: all of it.
            flush: make its name durable too; without it, a later `flush` of the folder does.
        """

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Writes a small file unless it is there; says whether it was written. Of several that try, one can."""

    @abstractmethod
    def stream(self, name: str, size: int, windows: Iterator[memoryview]) -> None:
        """Writes a new file; durable on return.

        Args:
            name: must not be there.
            size: bytes in all.
            windows: the bytes in order, page-aligned in memory and file; each is read before the next is asked for.
        """

    @abstractmethod
    def flush(self) -> None:
        """Makes the names right below durable."""

    @abstractmethod
    def move(self, name: str, target: str) -> None:
        """Renames a file or folder; `target` must not be there."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Removes a file or a folder with all below it, if it is there."""

    @abstractmethod
    def free_bytes(self) -> int | None:
        """Free space in bytes; None where it is not known."""
