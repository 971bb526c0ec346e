"""Whether folders can be written, how fast, and whether a checkpoint fits."""

import mmap
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from regrow.launch.doctor.verdict import State, Verdict

__all__ = ["check_bandwidth", "check_space", "check_writing", "existing"]

_CHUNK = 4 << 20
_MOST_BYTES, _SECONDS = 256 << 20, 1.0
_SLOW = 50e6


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def check_writing(name: str, folder: Path, field: str) -> Verdict:
    """Whether files can be made in a folder, or in what it will be made in.

    Args:
        name: of the check.
        folder: that is to be written.
        field: that says where it is.
    """
    place = existing(folder)
    probe = place / f".regrow-doctor-{os.getpid()}-{name.replace(' ', '-').replace('.', '-')}"
    remedy = f"choose a folder that you may write: {field}"
    try:
        with probe.open("wb") as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        found = f"{place} cannot be written ({error.strerror or error})"
        return Verdict(name=name, state=State.broken, found=found, remedy=remedy)
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
    made = "" if place == folder.absolute() else f"; {folder} will be made"
    return Verdict(name=name, state=State.ok, found=f"{place} can be written{made}")


def _write(path: Path, *, direct: bool) -> float:
    """Bytes a second over at most a second, past the page cache or into it."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | (os.O_DIRECT if direct else 0)
    descriptor, written = os.open(path, flags, 0o600), 0
    try:
        with mmap.mmap(-1, _CHUNK) as chunk:
            chunk[:] = os.urandom(1 << 16) * (_CHUNK >> 16)
            began = time.perf_counter()
            while written < _MOST_BYTES and time.perf_counter() - began < _SECONDS:
                written += os.write(descriptor, chunk)
            return written / (time.perf_counter() - began)
    finally:
        os.close(descriptor)


def check_bandwidth(folder: Path) -> Verdict:
    """How fast the storage takes what is written, with the page cache and without.

    Args:
        folder: of the runs.
    """
    path = existing(folder) / f".regrow-doctor-{os.getpid()}-bandwidth"
    try:
        cached = _write(path, direct=False)
        path.unlink()
        try:
            direct = _write(path, direct=True)
            past = f"{direct / 1e6:,.0f} MB/s past the page cache"
        except OSError as error:
            direct, past = cached, f"and it takes no direct writes ({error.strerror or error})"
    except OSError as error:
        found = f"{folder} cannot be measured ({error.strerror or error})"
        return Verdict(name="disk speed", state=State.broken, found=found, remedy="choose another run.root")
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
    found = f"writes of {cached / 1e6:,.0f} MB/s into the page cache, {past}"
    if direct < _SLOW:
        return Verdict(
            name="disk speed", state=State.warning, found=found,
            remedy="choose a faster run.root, or save more rarely: checkpoint.interval",
        )  # fmt: skip
    return Verdict(name="disk speed", state=State.ok, found=found)


def check_space(folder: Path, checkpoint_bytes: int | None, kept: int) -> Verdict:
    """Whether checkpoints fit.

    Args:
        folder: of the runs.
        checkpoint_bytes: of one; None where that is not known.
        kept: steps that are kept.
    """
    free = shutil.disk_usage(existing(folder)).free
    found = f"{free / 2**30:,.1f} GiB free"
    if checkpoint_bytes is None:
        return Verdict(name="disk space", state=State.ok, found=f"{found}; the size of a checkpoint is not known")
    found += f", and a checkpoint has {checkpoint_bytes / 2**30:,.2f} GiB"
    # The next one is written before one is removed.
    whole = checkpoint_bytes * (kept + 1)
    if free < checkpoint_bytes:
        state, remedy = State.broken, "free some, or choose another run.root"
    elif free < whole:
        state, remedy = State.warning, f"{kept} of them are kept: lower checkpoint.keep_latest_k, or free some"
    else:
        state, remedy = State.ok, ""
    return Verdict(name="disk space", state=state, found=found, remedy=remedy)
