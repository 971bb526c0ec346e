"""Who a process is, so that another one can prove that it has ended."""

import functools
import hashlib
import os
import re
from pathlib import Path

__all__ = ["boot_id", "has_ended", "pid_namespace", "process_stat", "process_tag", "tag_is_dead", "tag_is_local"]

_TAG = re.compile(r"([0-9a-f]{8})-([1-9][0-9]{0,8})-([0-9]{1,19})")


def boot_id() -> str:
    """The kernel's id of this boot; empty where it has none."""
    return _read("/proc/sys/kernel/random/boot_id").strip()


def pid_namespace() -> str:
    """The namespace in which process ids are unique; empty where it is not known."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def process_stat(pid: int) -> tuple[str, int]:
    """A process' state letter and start time in ticks since boot; `("", 0)` where none can be seen."""
    # The name, in brackets, may hold anything; the fields are counted from behind it.
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return (fields[0], int(fields[19])) if len(fields) > 19 else ("", 0)


def has_ended(pid: int, started: int) -> bool:
    """Whether the process of this boot and namespace that began at `started` (ticks since boot) is provably gone."""
    state, begun = process_stat(pid)
    if state:
        return begun != started or state in "ZX"
    try:
        os.kill(pid, 0)
    except PermissionError:
        # `/proc` is mounted with hidepid: other users' processes live unseen.
        return False
    except ProcessLookupError:
        return True
    return False


def process_tag() -> str:
    """This process, in what a file's name may hold: boot and namespace (hashed), pid, start time."""
    return _tag_of(os.getpid())


@functools.lru_cache
def _tag_of(pid: int) -> str:
    return f"{_here()}-{pid}-{process_stat(pid)[1]}"


def tag_is_local(tag: str) -> bool:
    """Whether a `process_tag` is of this boot and namespace, so that its process can be looked at."""
    match = _TAG.fullmatch(tag)
    return match is not None and boot_id() != "" and match[1] == _here()


def tag_is_dead(tag: str) -> bool:
    """Whether the process of a `process_tag` has provably ended; false for another host's or boot's."""
    match = _TAG.fullmatch(tag)
    return match is not None and tag_is_local(tag) and has_ended(int(match[2]), int(match[3]))


def _here() -> str:
    return hashlib.blake2b(f"{boot_id()}\0{pid_namespace()}".encode(), digest_size=4).hexdigest()
