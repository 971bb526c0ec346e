"""A storage whose listings are late, as those of NFS and of some object stores are; reading by name is not."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager

from regrow.checkpoint.files import SMALL_FILE_BYTES
from regrow.checkpoint.storage.base import RangeReader, Storage

__all__ = ["LateListings"]


class LateListings(Storage):
    """What is written, and what others write through a `view` of it, is listed `late_s` seconds later.

    Args:
        inner: where it lies.
        late_s: how late names come and go.
    """

    def __init__(self, inner: Storage, late_s: float) -> None:
        self._inner, self._late_s = inner, late_s
        self.url, self.renames = inner.url, inner.renames
        # The listings since each change, with the time of it.
        self._listings: list[tuple[float, list[str]]] = [(0.0, inner.names())]

    def _changed(self) -> None:
        self._listings.append((time.monotonic(), self._inner.names()))

    def names(self) -> list[str]:
        then = time.monotonic() - self._late_s
        return next(names for at, names in reversed(self._listings) if at <= then)

    def make(self) -> None:
        self._inner.make()

    def child(self, name: str) -> Storage:
        return self._inner.child(name)

    def parent(self) -> Storage | None:
        return self._inner.parent()

    def sizes(self) -> dict[str, int]:
        return self._inner.sizes()

    def exists(self, name: str) -> bool:
        return self._inner.exists(name)

    def read(self, name: str, limit: int = SMALL_FILE_BYTES) -> bytes:
        return self._inner.read(name, limit)

    def open(self, name: str) -> AbstractContextManager[RangeReader]:
        return self._inner.open(name)

    def write(self, name: str, data: bytes, *, flush: bool = True) -> None:
        self._inner.write(name, data, flush=flush)
        self._changed()

    def create(self, name: str, data: bytes) -> bool:
        created = self._inner.create(name, data)
        self._changed()
        return created

    def stream(self, name: str, size: int, windows: Iterator[memoryview]) -> None:
        self._inner.stream(name, size, windows)
        self._changed()

    def flush(self) -> None:
        self._inner.flush()

    def move(self, name: str, target: str) -> None:
        self._inner.move(name, target)
        self._changed()

    def remove(self, name: str) -> None:
        self._inner.remove(name)
        self._changed()

    def free_bytes(self) -> int | None:
        return self._inner.free_bytes()
