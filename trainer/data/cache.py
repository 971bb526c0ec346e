"""The folder in which tokenised corpora are kept, and what it remembers of corpora."""

import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash

from regrow.checkpoint.files import open_regular, read_regular
from regrow.trainer.data.config import DataConfig
from regrow.trainer.data.source import DataError, digest
from regrow.trainer.places import user_cache

__all__ = ["cache_folder", "content_digest", "file_digest", "writing_to"]

_CHUNK_BYTES = 1 << 20
# A file that changed this recently may change again within the resolution of its times.
_SETTLED_S = 2.0


def cache_folder(config: DataConfig) -> Path:
    """Where tokenised corpora are kept.

    Raises:
        DataError: `data.cache` begins with a home folder that there is not.
    """
    if config.cache is None:
        return user_cache()
    try:
        return Path(config.cache).expanduser()
    except RuntimeError:
        raise DataError(
            f"data.cache must be a folder where there is no home folder, but is {config.cache}; use an absolute path"
        ) from None


@contextmanager
def writing_to(folder: Path, field: str) -> Iterator[None]:
    """Turns an error of the disk into the sentence for it.

    Raises:
        DataError: naming `field`, the path and the reason.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise  # a sentence of our own
        path = error.filename if isinstance(error.filename, str) else folder
        raise DataError(
            f"{field} must be a folder that can be written, but {path} cannot ({error.strerror or error}); "
            "free space there or choose another one"
        ) from error


def content_digest(paths: Sequence[Path], remembered: Path | None) -> str:
    """Identifies files by their bytes, in order.

    Reading them all takes as long as the disk takes; so the answers, for each file and for all of them, are kept in
    `remembered` under their names, sizes, inodes and times, the time of the last change to the inode included, which
    nothing sets back.

    Raises:
        OSError: one cannot be read.
    """
    signature, newest = _signature(paths)
    note = None if remembered is None or len(paths) < 2 else remembered / signature
    found = _remembered(note)
    if found is not None:
        return found
    total = xxhash.xxh3_128()
    for path in paths:
        total.update(_remembered_digest(path, remembered))
    if _signature(paths)[0] == signature:
        _remember(note, total.hexdigest(), newest)
    return total.hexdigest()


def _remembered_digest(path: Path, remembered: Path | None) -> bytes:
    """`file_digest`, from its note where the file has not changed since; a small file is as soon read as a note."""
    signature, newest = _signature([path])
    small = path.stat().st_size < _CHUNK_BYTES
    note = None if remembered is None or small else remembered / f"file-{signature}"
    found = _remembered(note)
    if found is not None:
        return bytes.fromhex(found)
    made = file_digest(path)
    if _signature([path])[0] == signature:
        _remember(note, made.hex(), newest)
    return made


def _remembered(note: Path | None) -> str | None:
    """The digest that a note holds; None where there is none, or no sound one."""
    if note is None:
        return None
    with suppress(OSError):
        found = read_regular(note, 64).decode(errors="replace")
        if re.fullmatch("[0-9a-f]{32}", found):
            return found
    return None


def _remember(note: Path | None, found: str, newest: float) -> None:
    """Keeps a digest of files whose last change, in seconds of the clock, is old enough to count."""
    if note is None or abs(time.time() - newest) <= _SETTLED_S:
        return
    with suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        temporary = note.with_name(f"{note.name}.{os.getpid()}.tmp")
        temporary.write_text(found)
        temporary.rename(note)


def _signature(paths: Sequence[Path]) -> tuple[str, float]:
    """What changes when a file does, and the newest time in it."""
    stats = [p.stat() for p in paths]
    parts = [
        f"{p.absolute()}:{s.st_dev}:{s.st_ino}:{s.st_size}:{s.st_mtime_ns}:{s.st_ctime_ns}"
        for p, s in zip(paths, stats, strict=True)
    ]
    return digest(*parts), max((s.st_ctime for s in stats), default=0.0)


def file_digest(path: Path) -> bytes:
    """The hash (xxh3_128) of a regular file's bytes.

    Raises:
        OSError: it cannot be read.
    """
    hashed = xxhash.xxh3_128()
    with os.fdopen(open_regular(path), "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            hashed.update(chunk)
    return hashed.digest()
