"""Corpora in object stores (S3, Google, Azure) through obstore, with retries and back-off."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast, final

import obstore
from obstore.exceptions import BaseError
from obstore.store import from_url

from regrow.checkpoint.storage.base import as_os_error
from regrow.trainer.data.remote_files import RemoteObject, RemotePlace

__all__ = ["ObjectStorePlace", "open_place"]

_RETRY = {"max_retries": 5, "retry_timeout": timedelta(seconds=60)}


@contextmanager
def _errors(url: str) -> Iterator[None]:
    try:
        with as_os_error(url, BaseError):
            yield
    except FileNotFoundError as error:
        # obstore's own says the whole request.
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url) from error


@final
class ObjectStorePlace(RemotePlace):
    """A bucket.

    Args:
        root: its URL, `s3://bucket`.
        store: of obstore.
    """

    def __init__(self, root: str, store: Any) -> None:
        self._root = root
        self._store = store

    def _key(self, url: str) -> str:
        return url.removeprefix(self._root).lstrip("/")

    def _object(self, meta: Any) -> RemoteObject:
        tags = [str(meta[k]) for k in ("e_tag", "version") if meta.get(k)]
        return RemoteObject(f"{self._root}/{meta['path']}", int(meta["size"]), " ".join(tags) or None)

    def find(self, url: str) -> RemoteObject:
        if not self._key(url):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url)
        with _errors(url):
            return self._object(obstore.head(self._store, self._key(url)))

    def below(self, url: str) -> list[RemoteObject]:
        with _errors(url):
            pages = obstore.list(self._store, self._key(url) or None)
            found = [self._object(meta) for page in pages for meta in page]
        return sorted(found, key=lambda f: f.url)

    def read_range(self, url: str, offset: int, length: int) -> bytes:
        with _errors(url):
            return bytes(obstore.get_range(self._store, self._key(url), start=offset, length=length))


def open_place(url: str) -> ObjectStorePlace:
    """The bucket of a URL.

    Raises:
        ValueError: the URL is none that obstore takes.
        OSError: it cannot be opened.
    """
    root = "/".join(url.split("/")[:3])
    endpoint = os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT") or ""
    with _errors(url):
        # Which options there are depends on the URL, which mypy cannot know.
        store = cast(Any, from_url)(
            root, retry_config=_RETRY, client_options={"allow_http": endpoint.startswith("http://")}
        )
    return ObjectStorePlace(root, store)
