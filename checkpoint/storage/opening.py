"""From what a user types to a storage."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regrow.checkpoint.config import DirectIo
from regrow.checkpoint.storage.base import Storage
from regrow.checkpoint.storage.filesystem import FsspecStorage
from regrow.checkpoint.storage.local import LocalStorage
from regrow.checkpoint.storage.objects import OBJECT_SCHEMES, ObjectStorage
from regrow.errors import ConfigError

__all__ = ["as_storage", "is_url", "open_storage"]


def is_url(place: str) -> bool:
    """Whether a place is not a local path."""
    return "://" in place and not place.startswith("file://")


def open_storage(
    place: str | Path, options: Mapping[str, Any] | None = None, direct_io: DirectIo = DirectIo.auto
) -> Storage:
    """The storage for a path or a URL.

    Args:
        place: a path, `file://…`, `s3://…`, `gs://…`, `az://…`, or any URL that fsspec opens.
        options: for URLs; `endpoint`, `region` and the like.
        direct_io: for local folders.

    Raises:
        ConfigError: the URL's protocol is unknown or its library is not installed.
        OSError: the place cannot be reached.
    """
    text = str(place)
    if not is_url(text):
        return LocalStorage(Path(text.removeprefix("file://")).expanduser(), direct_io)
    scheme = text.split("://", 1)[0]
    if scheme in OBJECT_SCHEMES:
        return ObjectStorage(text, options or {})
    try:
        return FsspecStorage(text, options or {})
    except (ValueError, ImportError) as error:
        raise ConfigError(
            f"checkpoint.folder must have a protocol that fsspec opens, but is {text!r} ({error}); "
            "install what it needs, or use a path or s3://"
        ) from error


def as_storage(place: Storage | Path | str) -> Storage:
    """`place` itself, or the storage for a path or URL."""
    return place if isinstance(place, Storage) else open_storage(place)
