"""Who may write into a run: the lease of its launcher, and what killed processes left there."""

import fcntl
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from regrow.checkpoint.errors import CheckpointError
from regrow.checkpoint.run.lease import FencingToken, acquire_lease
from regrow.checkpoint.scratch import clear_dead_scratch
from regrow.checkpoint.storage.base import Storage
from regrow.checkpoint.storage.local import LocalStorage
from regrow.launch.config.errors import UserError
from regrow.launch.config.schema import Config
from regrow.launch.run.build import checkpoint_folder
from regrow.trainer.run_files import RECORD

__all__ = ["lease_place", "own_run", "share_run"]

log = logging.getLogger(__name__)

_RANKS_LOCK = ".ranks.lock"
# A document of the run before its rename: only the launcher and rank 0 write these, and only while they own the run.
_TEMPORARY = re.compile(
    r"\.((run|stop|tokenizer|kernels|pending-start)\.json|\.pending-start\.json|(config|overrides)\.yaml"
    r"|(metrics|samples)\.jsonl)(\.[0-9a-f-]+)*\.tmp|\.probe-[0-9]+|failed-rank-[0-9]+\.tmp"
)
_WAIT_S = 8.0


def lease_place(config: Config, run_dir: Path) -> Storage:
    """Beside the bytes that the lease protects."""
    return checkpoint_folder(config, run_dir) if config.checkpoint.enable else LocalStorage(run_dir)


@contextmanager
def own_run(config: Config, run_dir: Path) -> Iterator[FencingToken]:
    """Keeps every other launcher out of the run by the lease in its checkpoint folder.

    A dead launcher's ranks, which end with it, are waited for.

    Raises:
        UserError: another process holds the run.
    """
    setting = "checkpoint.folder" if config.checkpoint.enable else "run.root"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lease = acquire_lease(
            lease_place(config, run_dir),
            config.checkpoint.lease_timeout_s,
            str(run_dir),
            on_lost=_stop_at_once,
            setting=setting,
        )
    except CheckpointError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(
            f"run.root must be a folder that can be written, but {error.filename or run_dir} cannot "
            f"({error.strerror or error}); choose another one"
        ) from error
    try:
        _await_ranks(run_dir)
        _clear_leftovers(run_dir)
        yield lease.ticket
    finally:
        if _is_begun(run_dir):
            lease.release()
        elif lease.withdraw():
            _leave_unused(config, run_dir)


def _is_begun(run_dir: Path) -> bool:
    try:
        return (run_dir / RECORD).exists()
    except OSError:
        return True


def _stop_at_once() -> None:
    """Another launcher owns the run: nothing of this one may write into it any more. Its ranks die with it."""
    logging.shutdown()
    os._exit(1)


def _leave_unused(config: Config, run_dir: Path) -> None:
    """Removes what owning it left in the folder of a run that was refused before it began."""
    with suppress(OSError):
        (run_dir / _RANKS_LOCK).unlink(missing_ok=True)
    for folder in (run_dir / config.checkpoint.folder, run_dir):
        with suppress(OSError):
            folder.rmdir()


def _clear_leftovers(run_dir: Path) -> None:
    """Removes what killed processes left: of this run, and in the places that all programs share."""
    for line in clear_dead_scratch():
        log.info("%s", line)
    for folder in (run_dir, run_dir / ".hydra", run_dir / "logs", *(run_dir / "lineages").glob("*")):
        with suppress(OSError):
            for path in folder.iterdir():
                if _TEMPORARY.fullmatch(path.name) or path.match("lineages/*/*.jsonl.tmp"):
                    path.unlink()
                    log.info("removed %s, which a killed process left", path)


def _await_ranks(run_dir: Path) -> None:
    """Waits a little for a dead launcher's ranks on this host; stopped ones can commit nothing any more."""
    deadline = time.monotonic() + _WAIT_S
    with _ranks_lock(run_dir) as ranks:
        while ranks is not None and time.monotonic() < deadline:
            with suppress(BlockingIOError):
                _lock(ranks, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _lock(ranks, fcntl.LOCK_UN)
                return
            time.sleep(0.05)
    if ranks is not None:
        log.warning("ranks of an earlier start of %s are still there; they can save nothing any more", run_dir)


@contextmanager
def _ranks_lock(run_dir: Path) -> Iterator[int | None]:
    """The file by which ranks are waited for; None where it cannot be opened: it only spares a wait."""
    path = run_dir / _RANKS_LOCK
    try:
        # A named pipe in its place keeps nobody waiting.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    except OSError as error:
        log.info("%s cannot be opened (%s); continuing without a lock", path, error.strerror)
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int, operation: int) -> None:
    """Locks a file where its file system has locks: they only spare a wait, and the lease decides who may write."""
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        raise
    except OSError as error:
        log.info("%s cannot be locked (%s); continuing without a lock", _RANKS_LOCK, error.strerror)


@contextmanager
def share_run(run_dir: Path) -> Iterator[None]:
    """Held by each rank, so that a later launcher can tell when the last one is gone."""
    with _ranks_lock(run_dir) as ranks:
        if ranks is not None:
            _lock(ranks, fcntl.LOCK_SH)
        yield
