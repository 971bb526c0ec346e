"""From what a user types to a storage."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from regrow.checkpoint.config import DirectIo
from regrow.checkpoint.storage.base import Storage
from regrow.checkpoint.storage.local import LocalStorage
from regrow.errors import ConfigError

__all__ = ["as_storage", "is_url", "open_storage"]

_OBJECT_SCHEMES = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss")


def is_url(location: str) -> bool:
    """Whether a location is not a local path."""
    return "://" in location and not location.startswith("file://")


def open_storage(
    location: str | Path, options: Mapping[str, Any] | None = None, direct_io: DirectIo = DirectIo.auto
) -> Storage:
    """The storage for a path or a URL.

    Args:
        location: a path, `file://…`, `s3://…`, `gs://…`, `az://…`, or any URL that fsspec opens.
        options: for URLs; `endpoint`, `region` and the like.
        direct_io: for local folders.

    Raises:
        ConfigError: the URL's protocol is unknown or its library is not installed.
        OSError: the location cannot be reached.
    """
    text = str(location)
    if not is_url(text):
        return LocalStorage(Path(text.removeprefix("file://")).expanduser(), direct_io)
    if text.split("://", 1)[0] in _OBJECT_SCHEMES:
        return _object_storage(text, options or {})
    return _other_storage(text, options or {})


# The libraries for URLs are optional, and slow to import: their modules are loaded when a URL asks for them.


def _object_storage(url: str, options: Mapping[str, Any]) -> Storage:
    try:
        module = import_module("regrow.checkpoint.storage.objects")
    except ImportError as error:
        raise ConfigError(
            f"checkpoint.folder must be a local folder where obstore is not installed, but is {url!r}; "
            'install it with pip install "regrow[cloud]"'
        ) from error
    try:
        storage: Storage = module.ObjectStorage(url, options)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"checkpoint.folder must be a URL with options that obstore takes, but is {url!r} ({error}); correct it "
            "or checkpoint.storage_options"
        ) from error
    return storage


def _other_storage(url: str, options: Mapping[str, Any]) -> Storage:
    try:
        storage: Storage = import_module("regrow.checkpoint.storage.filesystem").FsspecStorage(url, options)
    except (ValueError, ImportError) as error:
        raise ConfigError(
            f"checkpoint.folder must have a protocol that fsspec opens, but is {url!r} ({error}); "
            "install what it needs, or use a path or s3://"
        ) from error
    return storage


def as_storage(location: Storage | Path | str) -> Storage:
    """The storage for a path or URL; a storage itself."""
    return location if isinstance(location, Storage) else open_storage(location)
