"""Object stores (S3, Google, Azure) through obstore: multipart uploads, retries with back-off, exclusive creation."""

import errno
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any, cast, final

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotSupportedError
from obstore.store import from_url

from regrow.checkpoint.files import SMALL_FILE_BYTES
from regrow.checkpoint.storage.base import COMMIT_FILE, RangeReader, RemoteFile, Storage, as_os_error, too_large

__all__ = ["ObjectStorage"]

log = logging.getLogger(__name__)

_PART_BYTES = 8 << 20
_PARTS_AT_ONCE = 4
# S3 takes 10,000 parts, and copies 5 GB at most by itself.
_MOST_PARTS = 9_000
_LARGEST_COPY = 4 << 30
_RETRY = {"max_retries": 5, "retry_timeout": timedelta(seconds=60)}


def _as_os_error(what: str) -> AbstractContextManager[None]:
    return as_os_error(what, BaseError)


@contextmanager
def _listing(what: str) -> Iterator[None]:
    """A prefix under which nothing lies is listed as empty; what is not found is the bucket."""
    try:
        with _as_os_error(what):
            yield
    except OSError as error:
        if "status code: 404" in str(error.__cause__):
            raise FileNotFoundError(errno.ENOENT, "The bucket does not exist", what) from error
        raise


def _part_bytes(size: int) -> int:
    """The size of an upload's parts."""
    return max(_PART_BYTES, -(-size // _MOST_PARTS // _PART_BYTES) * _PART_BYTES)


@final
class ObjectStorage(Storage):
    """A prefix in a bucket.

    Args:
        url: for instance `s3://bucket/prefix`.
        options: for obstore's store of that kind (`endpoint`, `region`, …); credentials come from the environment.
        prefix: below the URL's own.
    """

    renames = False

    def __init__(self, url: str, options: Mapping[str, Any], *, _store: Any = None, _prefix: str = "") -> None:
        self.url = url.rstrip("/")
        self._options = options
        self._prefix = _prefix
        self._store = _store
        if _store is None:
            given = dict(options)
            ends = [given.get("endpoint"), os.environ.get("AWS_ENDPOINT_URL"), os.environ.get("AWS_ENDPOINT")]
            plain_http = str(next((e for e in ends if e), "")).startswith("http://")
            with _as_os_error(url):
                # Which options there are depends on the URL, which mypy cannot know.
                self._store = cast(Any, from_url)(
                    self.url, retry_config=_RETRY, client_options={"allow_http": plain_http}, **given
                )

    def child(self, name: str) -> "ObjectStorage":
        return ObjectStorage(
            f"{self.url}/{name}", self._options, _store=self._store, _prefix=f"{self._prefix}{name}/"
        )

    def parent(self) -> "ObjectStorage | None":
        above, _, name = self.url.rpartition("/")
        return ObjectStorage(above, self._options) if name and not above.endswith("/") else None

    def make(self) -> None:
        """Prefixes need not be made."""

    def names(self) -> list[str]:
        with _listing(self.url):
            found = obstore.list_with_delimiter(self._store, self._prefix or None)
        paths = [*found["common_prefixes"], *(o["path"] for o in found["objects"])]
        return sorted({p.rstrip("/").rsplit("/", 1)[-1] for p in paths})

    def sizes(self) -> dict[str, int]:
        with _listing(self.url):
            found = obstore.list_with_delimiter(self._store, self._prefix or None)
        return {str(o["path"]).rsplit("/", 1)[-1]: int(o["size"]) for o in found["objects"]}

    def exists(self, name: str) -> bool:
        try:
            with _as_os_error(f"{self.url}/{name}"):
                obstore.head(self._store, self._prefix + name)
        except FileNotFoundError:
            return bool(self.child(name).names())
        return True

    def read(self, name: str, limit: int = SMALL_FILE_BYTES) -> bytes:
        with _as_os_error(f"{self.url}/{name}"):
            found = obstore.get(self._store, self._prefix + name)
            size = int(found.meta["size"])
            if size > limit:
                raise too_large(f"{self.url}/{name}", size, limit)
            return bytes(found.bytes())

    def read_range(self, name: str, offset: int, length: int) -> memoryview:
        """A part of an object; shorter at its end."""
        if length == 0:
            return memoryview(b"")
        with _as_os_error(f"{self.url}/{name}"):
            return memoryview(obstore.get_range(self._store, self._prefix + name, start=offset, length=length))

    @contextmanager
    def open(self, name: str) -> Iterator[RangeReader]:
        yield RemoteFile(lambda offset, length: self.read_range(name, offset, length))

    def write(self, name: str, data: bytes, *, flush: bool = True) -> None:
        with _as_os_error(f"{self.url}/{name}"):
            obstore.put(self._store, self._prefix + name, data, use_multipart=False)

    def create(self, name: str, data: bytes) -> bool:
        try:
            with _as_os_error(f"{self.url}/{name}"):
                obstore.put(self._store, self._prefix + name, data, mode="create")
        except OSError as error:
            if isinstance(error.__cause__, AlreadyExistsError):
                return False
            if not isinstance(error.__cause__, NotSupportedError) and "501" not in str(error):
                raise
            # A server without conditional writes: what remains is to look first.
            if self.exists(name):
                return False
            self.write(name, data)
        return True

    def stream(self, name: str, size: int, windows: Iterator[memoryview]) -> None:
        # Parts are uploaded while the next window is filled, so each has its own copy.
        parts = (bytes(window) for window in windows)
        with _as_os_error(f"{self.url}/{name}"):
            obstore.put(
                self._store, self._prefix + name, parts, chunk_size=_part_bytes(size), max_concurrency=_PARTS_AT_ONCE
            )

    def flush(self) -> None:
        """What was put is durable."""

    def _below(self, name: str) -> list[str]:
        with _listing(f"{self.url}/{name}"):
            pages = obstore.list(self._store, f"{self._prefix}{name}/")
            found = [entry["path"] for page in pages for entry in page]
        return sorted(str(path) for path in found)

    def move(self, name: str, target: str) -> None:
        source, goal = self._prefix + name, self._prefix + target
        paths = self._below(name) or [source]
        with _as_os_error(f"{self.url}/{name}"):
            for path in paths:
                self._copy(path, goal + path[len(source) :])
        self.remove(name)

    def _copy(self, path: str, goal: str) -> None:
        size = int(obstore.head(self._store, path)["size"])
        if size <= _LARGEST_COPY:
            obstore.copy(self._store, path, goal)
            return
        obstore.put(
            self._store,
            goal,
            (bytes(part) for part in obstore.get(self._store, path).stream(min_chunk_size=_PART_BYTES)),
            chunk_size=_part_bytes(size),
            max_concurrency=_PARTS_AT_ONCE,
        )

    def remove(self, name: str) -> None:
        # What makes a step valid goes first, so that a removal that is cut short leaves no step that looks whole.
        paths = sorted(self._below(name), key=lambda p: not p.endswith(COMMIT_FILE))
        with _as_os_error(f"{self.url}/{name}"):
            for path in paths or [self._prefix + name]:
                try:
                    obstore.delete(self._store, path)
                except FileNotFoundError:
                    continue

    def free_bytes(self) -> int | None:
        return None
