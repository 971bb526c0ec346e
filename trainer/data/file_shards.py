"""The shards of one file, kept in the cache by the file's content, so that a corpus takes over what others made.

files/ab/abcd…/shard-00000.*     a part of the file, as token stores have it
files/ab/abcd…/shard-00000.json  what makes the part whole: the hash of each of its files; written last
files/ab/abcd…/.lock             one process at a time writes a part

A store is made of hard links to them, or of copies where the file system has no links. Nothing here is ever removed:
whoever needs the room removes the folder `files`; stores keep what they are made of.
"""

import fcntl
import itertools
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from regrow.checkpoint.documents import Count, DocumentError, read_document
from regrow.checkpoint.files import read_regular
from regrow.trainer.data.cache import cache_folder, file_digest
from regrow.trainer.data.config import DataConfig, FileFields
from regrow.trainer.data.corpus_content import files_content
from regrow.trainer.data.corpus_files import reading
from regrow.trainer.data.corpus_paths import CorpusFile, LocalFile, ending_of, find_files, open_file
from regrow.trainer.data.recipe import file_key, file_options
from regrow.trainer.data.source import CorpusPart, CorpusSource, DataError
from regrow.trainer.data.token_store import shard_files

__all__ = ["ShardPlace", "check_unchanged", "finish", "kept_notes", "locked", "put_into_store", "shard_places"]

log = logging.getLogger(__name__)

_RECORD_BYTES = 1 << 20
_Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
_Words = Annotated[str, Meta(max_length=1 << 16)]
# What was noted of documents: how often, and where first.
Notes = dict[str, tuple[int, str]]


class _Record(Struct, frozen=True):
    """`shard-00000.json`.

    Attributes:
        tokens: hash of that file of the shard.
        documents: likewise.
        labels: likewise; None: there is no such file.
        notes: what was passed over or replaced in the part.
    """

    tokens: _Digest
    documents: _Digest
    labels: _Digest | None
    notes: Annotated[dict[_Words, tuple[Count, _Words]], Meta(max_length=10_000)]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardPlace:
    """Where the shard of a part of the corpus is written.

    Attributes:
        part: of the corpus.
        folder: that holds it.
        number: within the folder.
        content: identifies the bytes of the part's file; None: the shard lies in the store itself, kept nowhere else.
        size_bytes: the part's share of its file; 0: not known.
    """

    part: CorpusPart
    folder: Path
    number: int
    content: str | None
    size_bytes: int


def shard_places(
    source: CorpusSource, parts: list[CorpusPart], store: Path, encoding: dict[str, str] | None
) -> list[ShardPlace]:
    """Where the shards of a store's parts are written: in the cache by their files' contents where that can be.

    Args:
        source: of the text.
        parts: of the corpus; each becomes the shard of its place.
        store: its folder.
        encoding: how text becomes ids; None: in a way that is this corpus' own.

    Raises:
        DataError: a file cannot be read.
    """
    config = source.config
    if not isinstance(config, FileFields):
        return [_in_store(part, number, store, 0) for number, part in enumerate(parts)]
    files = {file.name: file for file in find_files(config.files)}
    options = file_options(source) if encoding is not None else None
    cache = _writable_cache(config) if options is not None else None
    places: list[ShardPlace] = []
    for name, group in itertools.groupby(parts, lambda part: part.path):
        of_file, file = list(group), files.get(name)
        size = _size(file) // len(of_file) if file is not None else 0
        # What has no name for its content would have to be read again after each part to know that it is the same.
        named = file is not None and (isinstance(file, LocalFile) or file.tag is not None)
        if file is None or not named or cache is None or options is None or encoding is None:
            places += [_in_store(part, n, store, size) for n, part in enumerate(of_file, len(places))]
            continue
        content, ending = files_content([file], config), ending_of(file)
        key = file_key(options, content=content, ending=ending, parts=of_file, encoding=encoding)
        folder = cache / key[:2] / key
        places += [
            ShardPlace(part=part, folder=folder, number=n, content=content, size_bytes=size)
            for n, part in enumerate(of_file)
        ]
    return places


def _in_store(part: CorpusPart, number: int, store: Path, size: int) -> ShardPlace:
    return ShardPlace(part=part, folder=store, number=number, content=None, size_bytes=size)


def _size(file: CorpusFile) -> int:
    with reading(file):
        return file.size()


def _writable_cache(config: DataConfig) -> Path | None:
    """The folder of all files' shards; None where none can be made, as for users without a home."""
    try:
        folder = cache_folder(config) / "files"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
        reason = "it is not writable"
    except (OSError, DataError) as error:
        reason = str(error)
    log.warning("what is tokenised is not kept for other corpora, because the cache cannot be used: %s", reason)
    return None


@contextmanager
def locked(place: ShardPlace) -> Iterator[None]:
    """Makes a second process that writes the same shard wait for the first."""
    place.folder.mkdir(parents=True, exist_ok=True)
    with (place.folder / ".lock").open("w") as lock:
        # A byte for each shard, so that processes tokenise parts of one file side by side.
        fcntl.lockf(lock, fcntl.LOCK_EX, 1, place.number)
        yield


def kept_notes(place: ShardPlace) -> Notes | None:
    """What was noted of the documents of a shard that is kept whole; None: it is not there, or damaged."""
    try:
        record = read_document(read_regular(_record(place), _RECORD_BYTES), _Record)
        files = shard_files(place.folder, place.number)
        wanted = {files.tokens: record.tokens, files.documents: record.documents}
        if record.labels is not None:
            wanted[files.labels] = record.labels
        sound = all(file_digest(path).hex() == made for path, made in wanted.items())
    except FileNotFoundError:
        return None
    except (DocumentError, OSError) as error:
        log.warning("tokenising %s again, because %s cannot be used: %s", place.part.path, _record(place), error)
        return None
    if not sound:
        log.warning("tokenising %s again, because its shard in %s is damaged", place.part.path, place.folder)
        return None
    return record.notes


def check_unchanged(place: ShardPlace, config: DataConfig) -> None:
    """Whether the file that was read is the one that the shard is named by; if not, nothing is left of the shard.

    Raises:
        DataError: it is not.
    """
    if files_content([open_file(place.part.path)], config) != place.content:
        for path in (_record(place), *shard_files(place.folder, place.number)):
            path.unlink(missing_ok=True)
        raise DataError("data.files must not change while they are tokenised, but did; give the command again")


def finish(place: ShardPlace, notes: Notes) -> None:
    """Makes a written shard count."""
    files = shard_files(place.folder, place.number)
    record = _Record(
        tokens=file_digest(files.tokens).hex(),
        documents=file_digest(files.documents).hex(),
        labels=file_digest(files.labels).hex() if files.labels.exists() else None,
        notes=notes,
    )
    temporary = _record(place).with_suffix(".json.tmp")
    temporary.write_bytes(msgspec.json.encode(record))
    temporary.rename(_record(place))


def _record(place: ShardPlace) -> Path:
    return place.folder / f"shard-{place.number:05d}.json"


def put_into_store(place: ShardPlace, store: Path, number: int) -> None:
    """Makes a kept shard the `number`-th of a store that has no index yet.

    Raises:
        OSError: the store cannot be written.
    """
    for kept, path in zip(shard_files(place.folder, place.number), shard_files(store, number), strict=True):
        path.unlink(missing_ok=True)
        if kept.exists():
            _link_or_copy(kept, path)


def _link_or_copy(kept: Path, path: Path) -> None:
    # Another file system, one without links, too many of them, or another user's file.
    with suppress(OSError):
        os.link(kept, path)
        return
    temporary = path.with_name(f"{path.name}.tmp")
    shutil.copyfile(kept, temporary)
    temporary.rename(path)
