"""Leases and readers' locks as damage, other programs or an attacker may leave them.

What each case promises: it ends within its time, and raises nothing but `CheckpointError`, whose message is one line.
"""

import json
import os
import random
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from regrow.checkpoint.errors import CheckpointError
from regrow.checkpoint.run.holder import HeartbeatMonitor, LeaseRecord, this_process
from regrow.checkpoint.run.lease import acquire_lease
from regrow.checkpoint.run.lease_file import LeaseHeldError
from regrow.checkpoint.run.leftovers import Leftovers
from regrow.checkpoint.run.reader_lock import held_by_readers
from regrow.checkpoint.storage.local import LocalStorage

__all__ = ["TIMEOUT_S", "check", "mutations"]

# Of the leases: a case may take so long and a second more.
TIMEOUT_S = 0.03

_SCALARS: list[Any] = [
    None, True, "", "x" * 70_000, "\x00", "../../x", "\ud800", "a\nb", -1, 0, 2**31, 2**64, 10**400, 1e999, float("nan"), -0.5,
    [], {}, [[]], "9" * 30,
]  # fmt: skip


def _valid(rng: random.Random) -> LeaseRecord:
    """A holder that lives, that is gone, or that nobody can look at."""
    me = this_process()
    gone = replace(me, pid=2**22 - 1)
    elsewhere = replace(me, host="elsewhere", boot="another", namespace="pid:[1]")
    return rng.choice(
        [me, gone, elsewhere, replace(elsewhere, released=True), replace(elsewhere, job="1", restart=3)]
    )


def _document(rng: random.Random) -> bytes:
    """A lease's bytes, changed somewhere."""
    fields: dict[str, Any] = asdict(_valid(rng))
    kind = rng.randrange(8)
    for _ in range(rng.randint(1, 3)):
        fields[rng.choice(list(fields))] = rng.choice(_SCALARS)
    if kind == 0:
        del fields[rng.choice(list(fields))]
    elif kind == 1:
        fields["later"] = rng.choice(_SCALARS)
    elif kind == 2:
        fields = {**asdict(_valid(rng)), "timeout_s": rng.choice([1e9, 1e308, 3599, 0, 1e-300])}
    body = json.dumps(fields).encode()
    if kind == 3:
        return body[: rng.randrange(len(body))]
    if kind == 4:
        return b"[" * rng.choice([10, 100_000]) + body
    if kind == 5:
        return rng.randbytes(rng.choice([0, 1, 100, 70_000]))
    if kind == 6:
        at = rng.randrange(len(body))
        return body[:at] + bytes([body[at] ^ (1 << rng.randrange(8))]) + body[at + 1 :]
    return body


def _put(rng: random.Random, path: Path) -> str:
    """Leaves something at `path`, whatever was there; returns what."""
    path.unlink(missing_ok=True)
    kind = rng.choice(["document"] * 12 + ["fifo", "folder", "full folder", "dangling", "loop", "device", "socket"])
    if kind == "document":
        path.write_bytes(_document(rng))
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind.endswith("folder"):
        path.mkdir()
        if kind == "full folder":
            (path / "x").write_bytes(b"x")
    elif kind == "socket":
        # By a short name: a socket's path is limited.
        here = os.open(path.parent, os.O_RDONLY)
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(f"/proc/self/fd/{here}/{path.name}")
        os.close(here)
    else:
        path.symlink_to({"dangling": "/nonexistent", "loop": path.name, "device": "/dev/zero"}[kind])
    return kind


def _lease_name(rng: random.Random) -> str:
    number = rng.choice(["1", "2", "7", "0", "007", "9" * 15, "9" * 20, "٣", "1e3", "-1", "", " 1"])
    return f"lease-{number}.json"


def _acquire(folder: Path) -> None:
    # A process that waits longer than this timeout for a core has lost its lease, as it must, and takes another.
    for _ in range(10):
        lease = acquire_lease(LocalStorage(folder), TIMEOUT_S, "the run")
        held = lease.ticket.is_held(lease.folder)
        lease.release()
        if held:
            return
    raise AssertionError("a lease that was taken is never held")


def _beat_on(rng: random.Random, folder: Path) -> None:
    """A lease that is held is damaged, and looked at."""
    lease = acquire_lease(LocalStorage(folder), TIMEOUT_S, "the run")
    _put(rng, folder / rng.choice([f"lease-{lease.ticket.number}.json", _lease_name(rng)]))
    time.sleep(TIMEOUT_S / 3)
    with suppress(OSError):  # it goes into a warning, or a save that fails
        lease.ticket.is_held(lease.folder)
    lease.release()


def _read_locks(folder: Path) -> None:
    place, watch = LocalStorage(folder).child("step-1"), HeartbeatMonitor()
    held_by_readers(place, watch, TIMEOUT_S)
    Leftovers(LocalStorage(folder), watch, TIMEOUT_S).clear()
    time.sleep(2 * TIMEOUT_S)
    held_by_readers(place, watch, TIMEOUT_S)


def mutations(rng: random.Random, folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """Names and cases, without end; each makes its own folder below `folder` when it is yielded."""
    n = 0
    while True:
        n += 1
        place = folder / f"lease-{n}"
        (place / "step-1").mkdir(parents=True)
        kind = rng.choice(["lease", "lease", "held", "reader"])
        if kind == "reader":
            what = [_put(rng, place / "step-1" / f"reader-{i}.json") for i in range(rng.randint(1, 3))]
            yield f"{n} reader {what}", lambda place=place: _read_locks(place)  # type: ignore[misc]
        elif kind == "lease":
            names = sorted({_lease_name(rng) for _ in range(rng.randint(1, 3))})
            what = [f"{name}: {_put(rng, place / name)}" for name in names]
            yield f"{n} {what}", lambda place=place: _acquire(place)  # type: ignore[misc]
        else:
            seed = rng.getrandbits(32)
            yield f"{n} held {seed}", lambda place=place, seed=seed: _beat_on(random.Random(seed), place)  # type: ignore[misc]


def check(case: Callable[[], None]) -> None:
    """Runs a case; AssertionError where it breaks its promise."""
    began = time.monotonic()
    try:
        case()
    except CheckpointError as error:
        assert "\n" not in str(error)
        # What was changed may still be the lease of a living process: the one that runs this.
        assert "must" in str(error) or isinstance(error, LeaseHeldError), error
    took_s = time.monotonic() - began
    assert took_s < TIMEOUT_S + 1, f"{took_s:.1f} s"
