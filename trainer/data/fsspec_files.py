"""Corpora behind whatever fsspec opens: `hf://`, `https://`, `sftp://`, `memory://` and the like."""

import errno
import os
from typing import Any, final

import fsspec

from regrow.checkpoint.storage.base import as_os_error
from regrow.trainer.data.remote_files import RemoteObject, RemotePlace

__all__ = ["FsspecPlace", "open_place"]

# What file systems call a name for a file's content; `hf` is that of Git or of its large files.
_TAGS = ("ETag", "etag", "md5Hash", "blob_id")


@final
class FsspecPlace(RemotePlace):
    """Whatever the URLs' protocol leads to."""

    def find(self, url: str) -> RemoteObject:
        with as_os_error(url, Exception):
            system, path = _opened(url)
            info = system.info(path)
        if info.get("type") == "directory":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url)
        return _object(url, info)

    def below(self, url: str) -> list[RemoteObject]:
        try:
            with as_os_error(url, Exception):
                system, path = _opened(url)
                found = system.find(path, detail=True)
        except FileNotFoundError:
            return []
        skipped = len(path.rstrip("/"))
        objects = [_object(f"{url}{name[skipped:]}", info) for name, info in found.items()]
        return sorted((f for f in objects if f.url.startswith(f"{url}/")), key=lambda f: f.url)

    def read_range(self, url: str, offset: int, length: int) -> bytes:
        with as_os_error(url, Exception):
            system, path = _opened(url)
            return bytes(system.cat_file(path, start=offset, end=offset + length))


def _opened(url: str) -> tuple[Any, str]:
    """The file system, which fsspec keeps, and the path in it."""
    system, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    return system, str(path)


def _object(url: str, info: Any) -> RemoteObject:
    if info.get("size") is None:
        raise OSError(f"{url} does not say its size")
    tag = next((str(info[k]) for k in _TAGS if info.get(k)), None)
    return RemoteObject(url, int(info["size"]), tag)


def open_place(url: str) -> FsspecPlace:
    """The place of a URL.

    Raises:
        ValueError: its protocol is unknown.
        ImportError: its library is not installed.
    """
    fsspec.get_filesystem_class(url.split("://", 1)[0].split("::", 1)[0])
    return FsspecPlace()
