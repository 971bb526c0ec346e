"""From what `data.files` names to files: paths, globs, URLs, and folders that Hugging Face's `datasets` saved."""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from glob import escape, glob
from importlib import import_module
from io import BufferedReader
from pathlib import Path
from typing import final

from regrow.checkpoint.files import open_regular, read_regular
from regrow.checkpoint.storage.opening import is_url
from regrow.trainer.data.saved_datasets import SMALL_BYTES, saved_files
from regrow.trainer.data.source import DataError, shown

__all__ = [
    "ENDINGS",
    "CorpusFile",
    "LocalFile",
    "cannot_be_read",
    "ending_of",
    "find_files",
    "no_files",
    "only_a_folder",
    "open_file",
]

ENDINGS = (
    ".txt",
    ".jsonl",
    ".jsonl.gz",
    ".jsonl.zst",
    ".jsonl.bz2",
    ".jsonl.xz",
    ".parquet",
    ".arrow",
)


class CorpusFile(ABC):
    """A file, wherever it lies.

    Attributes:
        name: its path or URL, as `open_file` takes it and messages show it.
        tag: what its place calls its content; None where it has no name for that.
    """

    name: str
    tag: str | None = None

    def __str__(self) -> str:
        return self.name

    @abstractmethod
    def open(self) -> BufferedReader:
        """Its bytes, from the beginning; seekable.

        Raises:
            OSError: it cannot be read, or is no regular file.
        """

    @abstractmethod
    def size(self) -> int:
        """Its length in bytes.

        Raises:
            OSError: it cannot be looked at.
        """


@final
class LocalFile(CorpusFile):
    """A file of this machine.

    Attributes:
        path: of it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)

    def open(self) -> BufferedReader:
        return os.fdopen(open_regular(self.path), "rb")

    def size(self) -> int:
        return self.path.stat().st_size


def open_file(name: str) -> CorpusFile:
    """The file of a name that `find_files` gave.

    Raises:
        DataError: it is behind a URL, and not there or out of reach.
    """
    if is_url(name):
        # The libraries for URLs are slow to import, and most corpora do without.
        found: CorpusFile = import_module("regrow.trainer.data.remote_files").open_remote(name)
        return found
    return LocalFile(Path(name))


def ending_of(file: CorpusFile) -> str:
    """Which of `ENDINGS` a file has; empty: none."""
    return next((e for e in ENDINGS if file.name.endswith(e)), "")


def find_files(patterns: Sequence[str]) -> list[CorpusFile]:
    """The files that paths, globs and URLs name: in their order, each once, those of one glob sorted.

    Raises:
        DataError: one names a folder that `datasets` did not save, or cannot be looked up.
        FileNotFoundError: one names nothing.
    """
    found: dict[str, CorpusFile] = {}
    for pattern in patterns:
        files: Sequence[CorpusFile]
        if is_url(pattern):
            # See `open_file`.
            files = import_module("regrow.trainer.data.remote_files").find_remote(pattern)
        else:
            files = [LocalFile(p) for p in _local(pattern.removeprefix("file://"))]
        found |= {f.name: f for f in files if f.name not in found}
    return list(found.values())


def cannot_be_read(name: str, error: OSError) -> DataError:
    """The error for a file or place that fails."""
    reason = error.strerror or shown(" ".join(str(error).split()))
    return DataError(f"data.files must be files that can be read, but {name} cannot ({reason}); check it")


def no_files(pattern: str) -> FileNotFoundError:
    """The error for a pattern that names nothing."""
    return FileNotFoundError(f"data.files must name files that exist, but {pattern} matches none; check the path")


def only_a_folder(pattern: str, example: str) -> DataError:
    """The error for a pattern that names folders alone."""
    return DataError(f"data.files must name files, but {pattern} is a folder; use for instance {example}")


def _local(pattern: str) -> list[Path]:
    """The files that a path or glob names, sorted; a name that exists is taken as it is, brackets and all."""
    try:
        path = Path(pattern).expanduser()
        found = [Path(m) for m in sorted(_expand(path))] if pattern and "\0" not in pattern else []
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"data.files must name files, but {pattern} cannot be looked up ({error}); check it"
        ) from error
    if not found:
        raise no_files(pattern)
    files = [f for match in found for f in _files_of(match)]
    if not files:
        raise only_a_folder(pattern, str(found[0] / "*.jsonl"))
    return files


def _files_of(match: Path) -> list[Path]:
    """A file itself; the data files of a saved dataset; nothing for another folder."""
    if not match.is_dir():
        return [match]
    names = saved_files(str(match), lambda name: read_regular(match / name, SMALL_BYTES))
    return [match / name for name in names]


def _expand(path: Path) -> list[str]:
    """What a glob matches; a part that exists by its very name is that name, as `a[1].txt` is."""
    bases = [path.anchor]
    for i, part in enumerate(path.parts[1 if path.anchor else 0 :], 1 if path.anchor else 0):
        if part == "**":
            rest = str(Path(*path.parts[i:]))
            return [m for b in bases for m in glob(str(Path(escape(b)) / rest), recursive=True)]  # noqa: PTH207
        step: list[str] = []
        for base in bases:
            literal = str(Path(base) / part)
            if os.path.lexists(literal):
                step.append(literal)
            else:
                step += glob(str(Path(escape(base)) / part))  # noqa: PTH207
        bases = step
    return bases
