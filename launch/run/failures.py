"""Which rank failed first, and why: of several that fail, the others only saw it go."""

import errno
import json
import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from regrow.checkpoint.documents import Count, DocumentError, read_document
from regrow.checkpoint.files import read_regular
from regrow.launch.config.errors import EXPLAINED
from regrow.trainer.run_record import RunRecordError

__all__ = [
    "RankFailed",
    "clear_failures",
    "failure_of",
    "first_failed",
    "first_failure",
    "note_failure",
    "note_sentence",
    "saw_another_go",
    "storage_problem",
]

log = logging.getLogger(__name__)

_LIMIT_BYTES = 1 << 20


# What a storage answers; other operating system errors are bugs, or come from the network of the ranks.
_STORAGE_CODES = {
    getattr(errno, name)
    for name in (
        "EIO", "ENOSPC", "EDQUOT", "ESTALE", "EROFS", "EACCES", "EPERM", "ENOENT", "ENOTDIR", "EISDIR", "EEXIST",
        "ENOTEMPTY", "ELOOP", "ENXIO", "ENODEV", "ENAMETOOLONG", "EFBIG", "EMLINK", "EINVAL", "EREMOTEIO", "ENOTCONN",
    )
}  # fmt: skip


class RankFailed(Exception):
    """This rank has written down why it failed; the other ranks must be ended.

    Attributes:
        exit_code: of the command.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def storage_problem(error: BaseException) -> str | None:
    """The sentence for an error that the run's storage gave; None for any other."""
    if isinstance(error, RunRecordError):
        return str(error)
    if not isinstance(error, OSError) or error.errno not in _STORAGE_CODES:
        return None
    where = error.filename if error.filename is not None else "a file of the run"
    return (
        f"run.root and the data must be on a storage that works, but {where} cannot be used ({error.strerror}); mend "
        "it and give the same command again"
    )


class _Failure(msgspec.Struct, frozen=True):
    rank: Count
    at: float
    message: Annotated[str, Meta(max_length=100_000)]


def _notes(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "logs").glob("failed-rank-*.json"))


def _note(run_dir: Path, rank: int) -> Path:
    return run_dir / "logs" / f"failed-rank-{rank}.json"


def clear_failures(run_dir: Path, rank: int | None = None) -> None:
    """Forgets the failures of an earlier start: of one rank, or of all."""
    for path in _notes(run_dir) if rank is None else [_note(run_dir, rank)]:
        with suppress(OSError):
            path.unlink()


def note_failure(run_dir: Path, rank: int, error: BaseException) -> None:
    """Writes down how this rank failed; a rank that cannot has its log all the same."""
    text = str(error) or type(error).__name__
    note_sentence(run_dir, rank, text if isinstance(error, EXPLAINED) else f"{type(error).__name__}: {text}")


def note_sentence(run_dir: Path, rank: int, message: str) -> None:
    """Writes down how a rank failed, for one that can no longer do so itself too."""
    body = {"rank": rank, "at": time.time(), "message": message[:2000]}
    path = _note(run_dir, rank)
    try:
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(body))
        temporary.rename(path)
    except OSError as problem:
        log.warning("%s cannot be written: %s", path, problem)


def _read_notes(run_dir: Path) -> list[_Failure]:
    found: list[_Failure] = []
    for path in _notes(run_dir):
        with suppress(OSError, DocumentError):
            found.append(read_document(read_regular(path, _LIMIT_BYTES), _Failure))
    return found


def first_failure(run_dir: Path) -> str | None:
    """The sentence of the rank that failed first; None where none has said how it failed."""
    rank = first_failed(run_dir)
    return None if rank is None else failure_of(run_dir, rank)


def first_failed(run_dir: Path) -> int | None:
    """The rank that failed first, of those of which is said how."""
    first = min(_read_notes(run_dir), key=lambda f: (f.at, f.rank), default=None)
    return None if first is None else first.rank


def failure_of(run_dir: Path, rank: int) -> str | None:
    """The sentence of a rank that failed; None where nobody has said how."""
    return next((f"rank {rank}: {f.message}" for f in _read_notes(run_dir) if f.rank == rank), None)


def saw_another_go(run_dir: Path, rank: int, error: BaseException) -> bool:
    """Whether an error is that of a collective which another rank, having said why, has left."""
    return isinstance(error, RuntimeError) and any(f.rank != rank for f in _read_notes(run_dir))
