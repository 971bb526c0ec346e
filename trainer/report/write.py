"""From folders to a page on the disk."""

import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from regrow.checkpoint.files import naming, temporary_path
from regrow.errors import ConfigError
from regrow.trainer.report.page import build_page
from regrow.trainer.report.read import LOG, read_run
from regrow.trainer.run_files import EVALUATIONS, METRICS, RECORD
from regrow.trainer.run_folders import is_run, run_folders

__all__ = ["find_runs", "state_of_files", "write_report"]


def find_runs(places: Sequence[Path]) -> list[tuple[Path, str]]:
    """The runs that are meant, each once, with a name for each.

    Args:
        places: runs, and folders with runs in them.

    Raises:
        ConfigError: a place is neither.
    """
    found: dict[Path, tuple[Path, str]] = {}
    for place in places:
        folders = [place] if is_run(place) else run_folders(place) if place.is_dir() else []
        if not folders:
            raise ConfigError(f"{place} must be a run or a folder with runs in it, but is neither; check the path")
        for folder in folders:
            own = place.resolve().name if folder == place else str(folder.relative_to(place))
            name = own if folder == place or len(places) == 1 else f"{place.resolve().name}/{own}"
            found.setdefault(folder.resolve(), (folder, name))
    return list(found.values())


def write_report(runs: Iterable[tuple[Path, str]], out: Path, title: str, *, reload_s: float = 0.0) -> int:
    """Replaces `out` by a page on runs: who reads it sees the old page or the new one, whole.

    Args:
        runs: directories with their names, as `find_runs` gives them.
        out: the page.
        title: of the page.
        reload_s: after which an open page loads itself again; 0 for never.

    Returns:
        The page's size in bytes.

    Raises:
        OSError: it cannot be written.
    """
    read = [read_run(folder, name) for folder, name in runs]
    page = build_page(read, title, made_at=time.time(), reload_s=reload_s).encode()
    temporary = temporary_path(out)
    try:
        with naming(out):
            temporary.write_bytes(page)
        temporary.rename(out)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    return len(page)


def state_of_files(runs: Iterable[tuple[Path, str]]) -> dict[Path, tuple[int, int]]:
    """Time and size of each file that a page is made from; another value means that it would be another page."""
    found = {}
    for folder, _ in runs:
        for name in (METRICS, RECORD, EVALUATIONS, LOG):
            with suppress(OSError):
                known = (folder / name).stat()
                found[folder / name] = (known.st_mtime_ns, known.st_size)
    return found
