"""What must not happen while something hostile is read: code run, paths outside, much memory, much time."""

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, final

__all__ = ["Guard", "GuardError"]

_RUNS = {
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "subprocess.Popen",
    "pty.spawn",
    "os.fork",
    "os.forkpty",
}
# What is changed, and the descriptor of the folder that a relative path begins in: the events' arguments.
_CHANGES = {
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((1, 3),),
    "os.symlink": ((1, 2),),
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.mkdir": ((0, 2),),
    "os.chmod": ((0, 2),),
}


class GuardError(AssertionError):
    """Something happened that must not."""


@final
class Guard:
    """Watches this process, by Python's audit events, its memory's high mark and an alarm.

    An audit hook stays for good, so there is one guard a process; it watches within `watching` alone.

    Args:
        folder: what is read may be changed below it, and nothing elsewhere.
        seconds: a reading may take.
        memory_bytes: a reading may take beyond what its inputs have.
    """

    def __init__(self, folder: Path, *, seconds: float = 10.0, memory_bytes: int = 256 << 20) -> None:
        self._allowed = [
            os.path.realpath(folder),
            os.path.realpath(tempfile.gettempdir()) + "/tmp",
            "/proc/self",
            "/dev/",
        ]
        self._seconds, self._memory_bytes = seconds, memory_bytes
        self._watching = False
        self._seen: list[str] = []
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._watching:
            return
        if event in _RUNS:
            self._seen.append(f"{event} {arguments[:2]!r}")
        elif event in _CHANGES:
            for path, folder in _CHANGES[event]:
                self._check(event, arguments[path], arguments[folder])
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            self._check("open for writing", arguments[0], -1)

    def _check(self, event: str, path: Any, descriptor: int) -> None:
        """Notes a change of what does not lie below an allowed folder.

        Args:
            event: what was done.
            path: to what.
            descriptor: of the folder that a relative path begins in; below 0: the working directory.
        """
        if not isinstance(path, str | bytes | os.PathLike):
            return
        base = Path(f"/proc/self/fd/{descriptor}").readlink() if descriptor >= 0 else Path.cwd()
        real = os.path.realpath((base / os.fsdecode(path)).parent)
        if not any(real.startswith(allowed) for allowed in self._allowed):
            self._seen.append(f"{event} {path!r}")

    @contextmanager
    def watching(self, what: str) -> Iterator[None]:
        """Raises GuardError, naming `what`, where something happened within that must not."""
        previous = signal.signal(signal.SIGALRM, _too_late)
        signal.setitimer(signal.ITIMER_REAL, self._seconds)
        before = _reset_high_mark()
        self._seen, self._watching = [], True
        try:
            yield
        finally:
            self._watching = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
        grown = _high_mark() - before
        if grown > self._memory_bytes:
            self._seen.append(f"{grown >> 20} MiB of memory")
        if self._seen:
            raise GuardError(f"{what}: {'; '.join(self._seen)}")


def _too_late(_number: int, _frame: FrameType | None) -> None:
    raise GuardError("it takes too long")


def _reset_high_mark() -> int:
    """Has the kernel count the high mark anew; bytes that are resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _high_mark()


def _high_mark() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))
