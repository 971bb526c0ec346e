"""A storage that counts what is read, to show that nothing is read twice."""

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager

from regrow.checkpoint.files import SMALL_FILE_BYTES
from regrow.checkpoint.storage.base import RangeReader, Storage

__all__ = ["CountingStorage"]


class CountingStorage(Storage):
    """Another storage, with its small reads counted.

    Args:
        inner: where the bytes are.
        reads: how often each file was read, by its path below the outermost storage; folders below share it.
    """

    def __init__(self, inner: Storage, reads: Counter[str] | None = None, prefix: str = "") -> None:
        self._inner, self._prefix = inner, prefix
        self.reads: Counter[str] = Counter() if reads is None else reads
        self.url, self.renames, self.is_remote = inner.url, inner.renames, inner.is_remote
        self.streams, self.request_bytes = inner.streams, inner.request_bytes

    def child(self, name: str) -> "CountingStorage":
        return CountingStorage(self._inner.child(name), self.reads, f"{self._prefix}{name}/")

    def parent(self) -> Storage | None:
        return self._inner.parent()

    def make(self) -> None:
        self._inner.make()

    def names(self) -> list[str]:
        return self._inner.names()

    def sizes(self) -> dict[str, int]:
        return self._inner.sizes()

    def exists(self, name: str) -> bool:
        return self._inner.exists(name)

    def read(self, name: str, limit: int = SMALL_FILE_BYTES) -> bytes:
        self.reads[f"{self._prefix}{name}"] += 1
        return self._inner.read(name, limit)

    def open(self, name: str) -> AbstractContextManager[RangeReader]:
        return self._inner.open(name)

    def write(self, name: str, data: bytes, *, flush: bool = True) -> None:
        self._inner.write(name, data, flush=flush)

    def create(self, name: str, data: bytes) -> bool:
        return self._inner.create(name, data)

    def stream(self, name: str, size: int, windows: Iterator[memoryview]) -> None:
        self._inner.stream(name, size, windows)

    def flush(self) -> None:
        self._inner.flush()

    def move(self, name: str, target: str) -> None:
        self._inner.move(name, target)

    def remove(self, name: str) -> None:
        self._inner.remove(name)

    def free_bytes(self) -> int | None:
        return self._inner.free_bytes()
