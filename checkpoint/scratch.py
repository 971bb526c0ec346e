"""Temporary files outside the run: named after their process, so that a later start can remove what a kill left."""

import logging
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import SemLock
from pathlib import Path
from typing import Any

from regrow.checkpoint.processes import process_tag, tag_is_dead

__all__ = ["clear_dead_scratch", "scratch_folder", "semaphore_prefix", "tag_semaphores"]

log = logging.getLogger(__name__)

_FOLDER = re.compile(r"regrow-([0-9a-f]{8}-[0-9]+-[0-9]+)-[A-Za-z0-9_]{8}")
# POSIX semaphores lie in Linux' shared memory under their names.
_SEMAPHORES = Path("/dev/shm")
_SEMAPHORE = re.compile(r"sem\.regrow-([0-9a-f]{8}-[0-9]+-[0-9]+)-[A-Za-z0-9_-]{1,32}")


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder that says whose it is; removed at the end, or at a later start after a kill."""
    with tempfile.TemporaryDirectory(prefix=f"regrow-{process_tag()}-") as folder:
        yield Path(folder)


def semaphore_prefix() -> str:
    """What the names of this process' semaphores begin with."""
    return f"/regrow-{process_tag()}"


def tag_semaphores() -> None:
    """Names the semaphores that this process makes for processes of its own after it (Linux).

    Python's own names do not say whose they are, and its resource tracker, which removes them, is killed where the
    whole process group is.
    """
    if not sys.platform.startswith("linux"):
        return
    names: Iterator[str] = tempfile._RandomNameSequence()  # type: ignore[attr-defined]  # noqa: SLF001
    # The method itself: joblib, where it is imported, has put its own in the place of Python's.
    SemLock._make_name = staticmethod(lambda: f"{semaphore_prefix()}-{next(names)}")  # type: ignore[attr-defined]  # noqa: SLF001


def clear_dead_scratch() -> list[str]:
    """Removes the temporary folders and semaphores of processes of this user that have provably ended.

    Returns:
        One line for each thing removed.
    """
    done = []
    for parent, names in ((Path(tempfile.gettempdir()), _FOLDER), (_SEMAPHORES, _SEMAPHORE)):
        for path in _owned_by_the_dead(parent, names):
            try:
                if names is _FOLDER:
                    shutil.rmtree(path)
                else:
                    path.unlink()
            except OSError as error:
                log.info("%s, which a killed process left, cannot be removed: %s", path, error.strerror or error)
            else:
                done.append(f"removed {path}, which a killed process left")
    return done


def _owned_by_the_dead(parent: Path, names: re.Pattern[str]) -> list[Path]:
    try:
        found = [(path, match[1]) for path in parent.iterdir() if (match := names.fullmatch(path.name))]
    except OSError:
        return []
    kind = stat.S_ISDIR if names is _FOLDER else stat.S_ISREG
    return [path for path, tag in found if tag_is_dead(tag) and _is_own(path, kind)]


def _is_own(path: Path, is_kind: Any) -> bool:
    """Whether it is this user's and no link: these folders are shared by all users."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return status.st_uid == os.geteuid() and bool(is_kind(status.st_mode))
