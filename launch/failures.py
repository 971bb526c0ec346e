"""Which rank failed first, and why: of several that fail, the others only saw it go."""

import json
import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from checkpoint.documents import Count, DocumentError, read_document
from checkpoint.files import read_regular

__all__ = ["clear_failures", "first_failure", "note_failure"]

log = logging.getLogger(__name__)

_LIMIT_BYTES = 1 << 20


class _Failure(msgspec.Struct, frozen=True):
    rank: Count
    at: float
    message: Annotated[str, Meta(max_length=100_000)]


def _notes(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "logs").glob("failed-rank-*.json"))


def clear_failures(run_dir: Path) -> None:
    """Forgets the failures of an earlier start."""
    for path in _notes(run_dir):
        with suppress(OSError):
            path.unlink()


def note_failure(run_dir: Path, rank: int, error: BaseException) -> None:
    """Writes down how this rank failed; a rank that cannot has its log all the same."""
    text = str(error) or type(error).__name__
    message = text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
    body = {"rank": rank, "at": time.time(), "message": message[:2000]}
    path = run_dir / "logs" / f"failed-rank-{rank}.json"
    try:
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(body))
        temporary.rename(path)
    except OSError as problem:
        log.warning("%s cannot be written: %s", path, problem)


def first_failure(run_dir: Path) -> str | None:
    """The sentence of the rank that failed first; None where none has said how it failed."""
    found: list[_Failure] = []
    for path in _notes(run_dir):
        with suppress(OSError, DocumentError):
            found.append(read_document(read_regular(path, _LIMIT_BYTES), _Failure))
    if not found:
        return None
    first = min(found, key=lambda f: (f.at, f.rank))
    return f"rank {first.rank}: {first.message}"
