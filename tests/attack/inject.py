"""Makes file operations of this process fail below one folder, whoever calls them: Python's own files included."""

import builtins
import errno
import io
import os
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["CODES", "Fault", "inject"]

CODES = {name: getattr(errno, name) for name in ("EIO", "ENOSPC", "ESTALE", "EDQUOT")}
# Python tells of these itself, before it does them.
_AUDITED = {
    "os.rename": "rename",
    "os.link": "link",
    "os.mkdir": "mkdir",
    "os.remove": "remove",
    "os.rmdir": "remove",
    "os.listdir": "list",
    "os.scandir": "list",
}
# Of these it does not; all of ours go through the functions of `os`, or through files that `open` made.
_WRAPPED = {
    "write": "write",
    "pwrite": "write",
    "fsync": "fsync",
    "read": "read",
    "pread": "read",
    "preadv": "read",
    "stat": "stat",
    "lstat": "stat",
    "fstat": "stat",
    "statvfs": "stat",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """What fails.

    Attributes:
        operation: `create` (opening for writing), `open` (for reading), `write`, `fsync`, `rename`, `link`, `mkdir`,
            `remove`, `list`, `stat` or `read`.
        path: an expression for the whole path, relative to the folder.
        code: the errno's name.
        first: which matching call fails first, from 1.
        lasting: all later ones fail, too.
    """

    operation: str
    path: str
    code: str
    first: int = 1
    lasting: bool = False


def inject(fault: Fault, folder: Path, met: Path) -> None:
    """From now on, for good.

    Args:
        fault: what fails.
        folder: below it.
        met: outside of it; made when the fault is met.
    """
    meet = _Meeting(fault, folder, met)
    _wrap_functions(meet)
    sys.addaudithook(_audit_hook(meet))
    if fault.operation in ("read", "write"):
        opened = _opener(meet)
        builtins.open = io.open = opened


class _Meeting:
    """Counts the matching calls, and fails those that it is to fail."""

    def __init__(self, fault: Fault, folder: Path, met: Path) -> None:
        self._fault, self._folder, self._met = fault, f"{folder}/", met
        self._pattern = re.compile(fault.path)
        self._count = 0
        self._lock = threading.Lock()
        self.operation = fault.operation

    def covers(self, path: str) -> bool:
        """Whether a path, absolute or relative to the working directory, is meant."""
        whole = os.path.abspath(path)  # noqa: PTH100
        return whole.startswith(self._folder) and bool(self._pattern.fullmatch(whole.removeprefix(self._folder)))

    def __call__(self, operation: str, *places: Any, at: Any = None) -> None:
        """Raises OSError where this call is to fail.

        Args:
            operation: its name.
            places: paths or descriptors; one that matches is enough.
            at: the folder's descriptor that the paths are relative to.
        """
        if operation != self.operation:
            return
        found = next((p for p in (_path_of(place, at) for place in places) if p and self.covers(p)), None)
        if found is None:
            return
        with self._lock:
            self._count += 1
            fails = self._count == self._fault.first or (self._fault.lasting and self._count > self._fault.first)
        if fails:
            self._met.touch()
            code = CODES[self._fault.code]
            raise OSError(code, os.strerror(code), found)


def _path_of(place: Any, at: Any) -> str | None:
    """The path that a function was given, or that a descriptor is of."""
    try:
        if isinstance(place, int):
            return str(Path(f"/proc/self/fd/{place}").readlink())
        name = os.fsdecode(place)
        if isinstance(at, int) and at >= 0 and not name.startswith("/"):
            return f"{Path(f'/proc/self/fd/{at}').readlink()}/{name}"
    except (OSError, TypeError):
        return None
    return name


def _audit_hook(meet: _Meeting) -> Callable[[str, tuple[Any, ...]], None]:
    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            writes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
            meet("create" if writes else "open", args[0])
        elif event in _AUDITED:
            ats = [a for a in args[1:] if isinstance(a, int)]
            paths = args[:2] if event in ("os.rename", "os.link") else args[:1]
            meet(_AUDITED[event], *paths, at=ats[-1] if ats else None)

    return audit


def _wrap_functions(meet: _Meeting) -> None:
    for name, operation in _WRAPPED.items():
        real = getattr(os, name)

        def wrapped(place: Any, *args: Any, real: Any = real, operation: str = operation, **options: Any) -> Any:
            meet(operation, place, at=options.get("dir_fd"))
            return real(place, *args, **options)

        if operation == meet.operation:
            setattr(os, name, wrapped)


def _opener(meet: _Meeting) -> Callable[..., Any]:
    """`open`, whose files below the folder ask before they read or write."""
    real = io.open

    class Raw(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            meet("read", self.fileno())
            return super().readinto(buffer)

        def readall(self) -> bytes:
            meet("read", self.fileno())
            return super().readall()

        def write(self, data: Any) -> int:
            meet("write", self.fileno())
            return super().write(data)

    def opened(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **options: Any) -> Any:
        path = _path_of(file, None)
        if path is None or not meet.covers(path) or "+" in mode:
            return real(file, mode, buffering, *args, **options)
        raw = Raw(file, mode.replace("b", "").replace("t", ""))
        buffered = io.BufferedReader(raw) if "r" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffered
        named = dict(zip(("encoding", "errors", "newline"), args, strict=False)) | options
        return io.TextIOWrapper(buffered, **named, line_buffering=buffering == 1)

    return opened
