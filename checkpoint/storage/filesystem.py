"""Whatever fsspec opens: `memory://`, `sftp://`, `hf://` and the like."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, final

import fsspec

from regrow.checkpoint.files import SMALL_FILE_BYTES
from regrow.checkpoint.storage.base import COMMIT_FILE, RangeReader, RemoteFile, Storage, as_os_error, too_large

__all__ = ["FsspecStorage"]


@final
class FsspecStorage(Storage):
    """A folder behind a URL.

    Args:
        url: with a protocol that fsspec knows.
        options: for that protocol's file system.

    Raises:
        ValueError: the protocol is unknown.
        ImportError: its library is not installed.
        OSError: the location cannot be reached.
    """

    renames = False

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        self.url = url.rstrip("/")
        self._options = dict(options)
        # What is wrong with the URL itself is no error of a storage.
        fsspec.get_filesystem_class(url.split("://", 1)[0].split("::", 1)[0])
        with as_os_error(url, Exception):
            self._fs, self._root = fsspec.core.url_to_fs(self.url, use_listings_cache=False, **self._options)

    def child(self, name: str) -> "FsspecStorage":
        return FsspecStorage(f"{self.url}/{name}", self._options)

    def parent(self) -> "FsspecStorage | None":
        above, _, name = self.url.rpartition("/")
        return FsspecStorage(above, self._options) if name and not above.endswith("/") else None

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def make(self) -> None:
        with as_os_error(self.url, Exception):
            self._fs.makedirs(self._root, exist_ok=True)

    def names(self) -> list[str]:
        try:
            with as_os_error(self.url, Exception):
                found = self._fs.ls(self._root, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted({str(p).rstrip("/").rsplit("/", 1)[-1] for p in found} - {""})

    def sizes(self) -> dict[str, int]:
        try:
            with as_os_error(self.url, Exception):
                found = self._fs.ls(self._root, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return {str(f["name"]).rsplit("/", 1)[-1]: int(f["size"]) for f in found if f["type"] == "file"}

    def exists(self, name: str) -> bool:
        with as_os_error(self.url, Exception):
            return bool(self._fs.exists(self._path(name)))

    def read(self, name: str, limit: int = SMALL_FILE_BYTES) -> bytes:
        with as_os_error(self.url, Exception):
            data = bytes(self._fs.cat_file(self._path(name), start=0, end=limit + 1))
        if len(data) > limit:
            raise too_large(f"{self.url}/{name}", len(data), limit)
        return data

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """A part of a file; shorter at its end."""
        with as_os_error(self.url, Exception):
            return bytes(self._fs.cat_file(self._path(name), start=offset, end=offset + length))

    @contextmanager
    def open(self, name: str) -> Iterator[RangeReader]:
        yield RemoteFile(lambda offset, length: self.read_range(name, offset, length))

    def write(self, name: str, data: bytes, *, flush: bool = True) -> None:
        with as_os_error(self.url, Exception):
            self._fs.pipe_file(self._path(name), data)

    def create(self, name: str, data: bytes) -> bool:
        if self.exists(name):
            return False
        try:
            with as_os_error(self.url, Exception):
                self._fs.pipe_file(self._path(name), data, mode="create")
        except FileExistsError:
            return False
        return True

    def stream(self, name: str, size: int, windows: Iterator[memoryview]) -> None:
        with as_os_error(self.url, Exception), self._fs.open(self._path(name), "wb") as out:
            for window in windows:
                out.write(window)

    def flush(self) -> None:
        """What was closed is as durable as the place makes it."""

    def move(self, name: str, target: str) -> None:
        with as_os_error(self.url, Exception):
            self._fs.makedirs(self._path(target).rsplit("/", 1)[0], exist_ok=True)
            self._fs.mv(self._path(name), self._path(target), recursive=self._fs.isdir(self._path(name)))

    def remove(self, name: str) -> None:
        path = self._path(name)
        with as_os_error(self.url, Exception):
            # What makes a step valid goes first.
            if self._fs.exists(f"{path}/{COMMIT_FILE}"):
                self._fs.rm_file(f"{path}/{COMMIT_FILE}")
            if self._fs.exists(path):
                self._fs.rm(path, recursive=True)

    def free_bytes(self) -> int | None:
        return None
