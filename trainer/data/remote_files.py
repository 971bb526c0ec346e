"""Files behind URLs: found by name or glob, and read by ranges, never as a whole."""

import io
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from typing import Any, final

from regrow.trainer.data.corpus_paths import CorpusFile, cannot_be_read, no_files, only_a_folder
from regrow.trainer.data.saved_datasets import SMALL_BYTES, saved_files
from regrow.trainer.data.source import DataError, shown

__all__ = ["RemoteFile", "RemoteObject", "RemotePlace", "find_remote", "open_remote"]

# What is asked for at a time, and held of a file that is read from its beginning to its end.
_REQUEST_BYTES = 4 << 20
_OBJECT_SCHEMES = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss")
_MAGIC = frozenset("*?[")


@dataclass(frozen=True, slots=True)
class RemoteObject:
    """What a listing tells of one file.

    Attributes:
        url: of it.
        size: bytes.
        tag: changes with its content; None: the place tells nothing of the kind.
    """

    url: str
    size: int
    tag: str | None


class RemotePlace(ABC):
    """A bucket or a server.

    All methods raise OSError where it fails, and FileNotFoundError where something is not there.
    """

    @abstractmethod
    def find(self, url: str) -> RemoteObject:
        """The file of exactly this URL."""

    @abstractmethod
    def below(self, url: str) -> list[RemoteObject]:
        """All files whose URLs begin with this one and a slash, sorted; empty where there are none."""

    @abstractmethod
    def read_range(self, url: str, offset: int, length: int) -> bytes:
        """Bytes of a file; fewer at its end."""


@final
class RemoteFile(CorpusFile):
    """A file behind a URL.

    Args:
        place: where it lies.
        found: what the place tells of it.
    """

    def __init__(self, place: RemotePlace, found: RemoteObject) -> None:
        self.name = found.url
        self.tag = found.tag
        self._found = found
        self._place = place

    def open(self) -> io.BufferedReader:
        return io.BufferedReader(_Ranges(self._place, self._found), _REQUEST_BYTES)

    def size(self) -> int:
        return self._found.size


@final
class _Ranges(io.RawIOBase):
    """The bytes of a remote file."""

    def __init__(self, place: RemotePlace, found: RemoteObject) -> None:
        self._place = place
        self._found = found
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._found.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, out: Any) -> int:
        """Fills `out`; 0 at the end.

        Raises:
            OSError: the place fails, or has fewer bytes than its listing said.
        """
        length = min(len(out), max(0, self._found.size - self._position))
        if length == 0:
            return 0
        data = self._place.read_range(self._found.url, self._position, length)
        if not 0 < len(data) <= length:
            raise OSError(f"{len(data)} bytes came for {length}: it has changed")
        out[: len(data)] = data
        self._position += len(data)
        return len(data)


def _place_of(url: str) -> RemotePlace:
    """The place of a URL; credentials, endpoints and regions come from the environment.

    Raises:
        DataError: no installed library opens it.
    """
    scheme = url.split("://", 1)[0]
    # The libraries for URLs are optional, and slow to import: their modules are loaded when a URL asks for them.
    name = "object_store_files" if scheme in _OBJECT_SCHEMES else "fsspec_files"
    try:
        place: RemotePlace = import_module(f"regrow.trainer.data.{name}").open_place(url)
    except ImportError as error:
        remedy = 'pip install "regrow[cloud]"' if scheme in _OBJECT_SCHEMES else "the package that it names"
        raise DataError(
            f"data.files must be paths, or URLs whose library is installed, but holds {url} ({shown(str(error))}); "
            f"install {remedy}"
        ) from error
    except ValueError as error:
        raise DataError(
            f"data.files must be paths, or URLs that obstore or fsspec open, but holds {url} ({shown(str(error))}); "
            "correct it"
        ) from error
    return place


def open_remote(url: str) -> RemoteFile:
    """The file of a URL.

    Raises:
        DataError: no installed library opens it, it is not there, or the place cannot be reached.
    """
    try:
        place = _place_of(url)
        return RemoteFile(place, place.find(url))
    except OSError as error:
        raise cannot_be_read(url, error) from error


def find_remote(pattern: str) -> list[RemoteFile]:
    """The files that a URL or a glob in one names, sorted; a name that exists is taken as it is, brackets and all.

    Raises:
        DataError: it names a folder, or the place cannot be reached.
        FileNotFoundError: it names nothing.
    """
    url = pattern.rstrip("/")
    try:
        place = _place_of(url)
        try:
            return [RemoteFile(place, place.find(url))]
        except FileNotFoundError:
            found = _matching(place, url) if _MAGIC & set(url) else _saved(place, url)
    except OSError as error:
        raise cannot_be_read(pattern, error) from error
    if not found:
        raise no_files(pattern)
    return [RemoteFile(place, f) for f in found]


def _matching(place: RemotePlace, url: str) -> list[RemoteObject]:
    """What a glob matches."""
    parts = url.split("/")
    fixed = next(i for i, part in enumerate(parts) if _MAGIC & set(part))
    base = "/".join(parts[:fixed])
    return [f for f in place.below(base) if _matches(f.url.removeprefix(f"{base}/").split("/"), parts[fixed:])]


def _matches(names: list[str], patterns: list[str]) -> bool:
    """Whether names match part by part, as `glob` has it: `**` is any number of parts, hidden ones are
    matched by name.
    """
    if not patterns or not names:
        return not names and all(p == "**" for p in patterns)
    if patterns[0] == "**":
        return _matches(names, patterns[1:]) or (not names[0].startswith(".") and _matches(names[1:], patterns))
    hidden = names[0].startswith(".") and not patterns[0].startswith(".")
    return not hidden and fnmatchcase(names[0], patterns[0]) and _matches(names[1:], patterns[1:])


def _saved(place: RemotePlace, url: str) -> list[RemoteObject]:
    """The files of a dataset that was saved there; empty where nothing is.

    Raises:
        DataError: other files are.
    """
    below = {f.url: f for f in place.below(url)}
    if not below:
        return []

    def read(name: str) -> bytes:
        found = below.get(f"{url}/{name}")
        if found is None:
            raise FileNotFoundError(name)
        if found.size > SMALL_BYTES:
            raise OSError(f"{found.url} is larger than {SMALL_BYTES} bytes")
        with RemoteFile(place, found).open() as file:
            return file.read()

    names = saved_files(url, read)
    if not names:
        raise only_a_folder(url, f"{url}/*.jsonl")
    missing = [name for name in names if f"{url}/{name}" not in below]
    if missing:
        lacking = shown(", ".join(missing))
        raise DataError(f"data.files must name whole datasets, but {url} lacks {lacking}; fetch it again")
    return [below[f"{url}/{name}"] for name in names]
