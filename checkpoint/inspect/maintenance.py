"""Looking after the steps of a folder: listing, verifying, pinning, pruning, repairing. No run is needed for it."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, final

from regrow.checkpoint.config import KeepEveryNConfig
from regrow.checkpoint.errors import CheckpointError, OtherFormatError
from regrow.checkpoint.format.archive_check import stream_problems
from regrow.checkpoint.format.manifest import MANIFEST
from regrow.checkpoint.format.step_name import (
    METADATA,
    is_leftover,
    parse_leftover,
    parse_set_aside,
    parse_step_name,
    step_folder_name,
)
from regrow.checkpoint.format.stored_step import StoredStep, is_verified
from regrow.checkpoint.format.tensor_source import TensorSource, segments, whole
from regrow.checkpoint.load.locate import is_incomplete
from regrow.checkpoint.load.open_source import DcpSource, StepSource, open_source
from regrow.checkpoint.policy.best import BestMetric
from regrow.checkpoint.policy.retention import KeepEveryN, KeepLatest, RetainableStep, RetentionRule, removable_steps
from regrow.checkpoint.run.catalog import ASIDE, PIN, Catalog
from regrow.checkpoint.run.lease import HeartbeatMonitor, acquire_lease
from regrow.checkpoint.run.leftovers import Leftovers
from regrow.checkpoint.storage.base import Storage
from regrow.checkpoint.storage.local import LocalStorage
from regrow.errors import ConfigError

__all__ = ["Row", "folder_of", "list_steps", "pin", "prune", "repair", "show", "tree", "unpin", "verify"]

_PIECE_BYTES = 32 << 20
_LEASE_S = 60.0
# What `ls` calls best, as retention does unless it is told otherwise.
_BEST = BestMetric()


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What `ls` says of one folder.

    Attributes:
        name: of the folder, below the checkpoint folder.
        step: its number.
        state: `complete`, `partial` (a save that is under way or was cut short), `damaged`, `other version` (of a
            format that this version does not read), `unverified` (others wrote it, without hashes), or `set aside`.
        problem: what is wrong.
        nbytes: of its files.
        age_s: since its manifest was written; None where the storage cannot tell.
        kind: `full` or `model`.
        layout: degrees that wrote it.
        metrics: measured at that step.
        pinned: stays for good.
        best: of the complete steps, by validation loss.
    """

    name: str
    step: int
    state: str
    problem: str = ""
    nbytes: int = 0
    age_s: float | None = None
    kind: str = ""
    layout: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    pinned: bool = False
    best: bool = False

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def folder_of(storage: Storage) -> Storage:
    """The checkpoint folder that is meant: itself, or that of a run.

    Raises:
        CheckpointError: neither is there.
    """
    for folder in (storage, storage.child("checkpoint")):
        if any(parse_step_name(n) is not None or is_leftover(n) or n == ASIDE for n in folder.names()):
            return folder
    if storage.exists("run.json") or storage.child("checkpoint").names():
        return storage.child("checkpoint")
    if any(n.startswith("lease-") for n in storage.names()):
        return storage
    raise CheckpointError(f"RUN must be a run or a folder with steps, but {storage.url} is neither; check the path")


def list_steps(storage: Storage) -> list[Row]:
    """Every step and what is left of one, by number; those set aside last."""
    folder = folder_of(storage)
    names = [n for n in folder.names() if parse_step_name(n) is not None or is_leftover(n)]
    rows = [_row(folder, n, now=time.time()) for n in names]
    rows.sort(key=lambda r: (r.step, r.name))
    best = _BEST.best_step((r.step, r.metrics) for r in rows if r.state == "complete")
    rows = [replace(r, best=r.state == "complete" and r.step == best) for r in rows]
    aside = folder.child(ASIDE)
    for reason in aside.names():
        for name in aside.child(reason).names():
            step = parse_set_aside(name)
            if step is not None:
                size = sum(aside.child(reason).child(name).sizes().values())
                rows.append(
                    Row(
                        name=f"{ASIDE}/{reason}/{name}",
                        step=step,
                        state="set aside",
                        problem=reason,
                        nbytes=size,
                    )
                )
    return rows


def _row(folder: Storage, name: str, now: float) -> Row:
    left, storage = parse_leftover(name), folder.child(name)
    try:
        nbytes, pinned = sum(storage.sizes().values()), storage.exists(PIN)
    except OSError:
        nbytes, pinned = 0, False
    if left is not None:
        return Row(name=name, step=left, state="partial", nbytes=nbytes)
    step = parse_step_name(name)
    assert step is not None, "the caller asks for steps and what is left of them"
    try:
        opened = Catalog(folder).open(step)
    except OtherFormatError as error:
        return Row(name=name, step=step, state="other version", problem=str(error), nbytes=nbytes, pinned=pinned)
    except CheckpointError as error:
        state = _state_without_manifest(storage) if isinstance(error.__cause__, FileNotFoundError) else "damaged"
        problem = "no manifest" if state != "damaged" else str(error)
        return Row(name=name, step=step, state=state, problem=problem, nbytes=nbytes, pinned=pinned)
    age = now - (storage.path / MANIFEST).stat().st_mtime if isinstance(storage, LocalStorage) else None
    return Row(
        name=name,
        step=step,
        state="complete",
        nbytes=nbytes,
        age_s=age,
        kind=opened.kind,
        layout=opened.manifest.layout,
        metrics=opened.metrics(),
        pinned=pinned,
    )


def _state_without_manifest(storage: Storage) -> str:
    """On an object store a save that is under way, or was cut short, looks so."""
    try:
        if storage.exists(METADATA) and not is_incomplete(storage):
            return "unverified"
    except OSError:
        return "damaged"
    return "damaged" if storage.renames else "partial"


def show(storage: Storage | str) -> dict[str, Any]:
    """What a checkpoint is, and its tensors."""
    with open_source(storage) as source:
        about: dict[str, Any] = {"checkpoint": source.place}
        if isinstance(source, StepSource):
            m = source.manifest
            about |= {"step": m.step, "kind": m.kind, "lineage": m.lineage, "layout": m.layout, "ranks": m.ranks}
            about |= {"metrics": m.metrics, "train_state": m.train_state, "versions": m.versions}
        nbytes = sum(i.nbytes for i in source.infos.values())
        about |= {"tensors": len(source.infos), "bytes": nbytes}
        tensors = [
            {
                "name": name,
                "dtype": str(info.dtype).removeprefix("torch."),
                "shape": list(info.shape),
                "bytes": info.nbytes,
                "shards": source.shards(name) if isinstance(source, StepSource | DcpSource) else 1,
            }
            for name, info in source.infos.items()
        ]
    return {"about": about, "tensors": tensors}


def tree(tensors: list[dict[str, Any]]) -> list[str]:
    """Sums by module, as an indented tree."""
    sums: dict[tuple[str, ...], tuple[int, int]] = {}
    for tensor in tensors:
        parts = tuple(str(tensor["name"]).split("."))
        for depth in range(1, len(parts) + 1):
            count, nbytes = sums.get(parts[:depth], (0, 0))
            sums[parts[:depth]] = (count + 1, nbytes + int(tensor["bytes"]))

    def key(path: tuple[str, ...]) -> list[tuple[int, str]]:
        return [(int(p), "") if p.isdigit() else (-1, p) for p in path]

    return [
        f"{'  ' * (len(path) - 1)}{path[-1]}  {count} tensor{'s' if count > 1 else ''}, {nbytes / 2**20:.2f} MiB"
        for path, (count, nbytes) in sorted(sums.items(), key=lambda pair: key(pair[0]))
    ]


def verify(
    storage: Storage, threads: int = 4, progress: Callable[[int, int], None] = lambda _done, _total: None
) -> list[dict[str, Any]]:
    """Reads everything and compares it with its hashes: one report for each step, with what is wrong.

    Args:
        storage: a run, a checkpoint folder or a step.
        threads: that read.
        progress: told the bytes of tensors read and in all files, by each of them.
    """
    if is_verified(storage) or storage.exists(METADATA) or not _has_steps(storage):
        return [_verify_one(storage, threads, _Reading(sum(storage.sizes().values()), progress))]
    folder = folder_of(storage)
    rows = [r for r in list_steps(folder) if parse_step_name(r.name) is not None]
    if not rows:
        raise CheckpointError(f"RUN must hold a step, but {folder.url} holds none; check the path")
    reading = _Reading(sum(r.nbytes for r in rows), progress)
    return [_verify_one(folder.child(r.name), threads, reading) for r in rows]


@final
class _Reading:
    """What has been read of how much, by several threads."""

    def __init__(self, total_bytes: int, progress: Callable[[int, int], None] = lambda _done, _total: None) -> None:
        self._total, self._progress, self._done = total_bytes, progress, 0
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        """Counts what was read just now."""
        with self._lock:
            self._done += nbytes
            self._progress(min(self._done, self._total), self._total)


def _has_steps(storage: Storage) -> bool:
    try:
        folder_of(storage)
    except CheckpointError:
        return False
    return True


def _verify_one(storage: Storage, threads: int, reading: _Reading) -> dict[str, Any]:
    report: dict[str, Any] = {"place": storage.url, "tensors": 0, "bytes": 0, "hashed": False, "problems": []}
    step = parse_step_name(storage.url.rstrip("/").rpartition("/")[2])
    try:
        with open_source(storage) as source:
            report["hashed"] = isinstance(source, StepSource)
            if isinstance(source, StepSource) and step is not None and source.manifest.step != step:
                report["problems"].append(f"its manifest is of step {source.manifest.step}")
            report["tensors"] = len(source.infos)
            report["bytes"] = sum(i.nbytes for i in source.infos.values())
            with ThreadPoolExecutor(threads) as pool:
                answers = list(pool.map(lambda name: _verify_tensor(source, name, reading), source.infos))
            report["problems"] += [a for a in answers if a is not None]
            if isinstance(source, StepSource):
                opened, m = source.step, source.manifest
                report["problems"] += stream_problems(storage, opened.items(), m.files, m.versions.get("torch", ""))
                for stored in opened.objects().values():
                    opened.read_object(stored)
    except FileNotFoundError as error:
        report["problems"].append(f"{error.filename or error} is missing")
    except (CheckpointError, OSError) as error:
        report["problems"].append(str(error))
    return report


def _verify_tensor(source: TensorSource, name: str, reading: _Reading) -> str | None:
    info = source.infos[name]
    try:
        for box in segments(whole(info.shape), info.dtype.itemsize, _PIECE_BYTES):
            reading.add(source.read(name, box).nbytes)
    except (CheckpointError, OSError) as error:
        return str(error)
    return None


def pin(storage: Storage) -> None:
    """Keeps a step, whatever retention says.

    Raises:
        CheckpointError: it is not a complete step.
    """
    _complete(storage)
    storage.write(PIN, b"")


def unpin(storage: Storage) -> None:
    """The inverse of `pin`."""
    _complete(storage)
    storage.remove(PIN)


def _complete(storage: Storage) -> StoredStep:
    try:
        return StoredStep.open(storage)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"STEP must be a complete step, but {storage.url} has no manifest; give the folder of a step"
        ) from error


@contextmanager
def _owned(folder: Storage) -> Iterator[None]:
    """This process is the folder's one writer meanwhile: nothing is removed below a run that trains."""
    lease = acquire_lease(folder, _LEASE_S, folder.url, setting="RUN", remedy="wait until it has ended, or stop it")
    try:
        yield
    finally:
        lease.release()


def prune(storage: Storage, keep_latest: int, keep_every: int | None, *, dry_run: bool) -> list[int]:
    """Removes steps; returns which. The newest, the newest full one, pinned and read ones always stay.

    Raises:
        ConfigError: fewer than 1 to keep.
        LeaseHeldError: the run is being trained.
    """
    for name, value in (("--keep-latest", keep_latest), ("--keep-every", keep_every)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, but is {value}; use 1 or more")
    folder = folder_of(storage)
    rules: list[RetentionRule] = [KeepLatest(keep_latest)]
    if keep_every is not None:
        rules.append(KeepEveryN(KeepEveryNConfig(n=keep_every)))
    complete = [r for r in list_steps(folder) if r.state == "complete"]
    full = max((r.step for r in complete if r.kind == "full"), default=-1)
    stored = [RetainableStep(step=r.step, pinned=r.pinned or r.step == full, metrics=r.metrics) for r in complete]
    if dry_run:
        return removable_steps(rules, stored)
    with _owned(folder):
        return Catalog(folder, _LEASE_S).remove_unread(removable_steps(rules, stored))


def repair(storage: Storage) -> list[str]:
    """Removes what killed saves left, sets damaged steps aside, and says which step a run would continue from.

    Raises:
        LeaseHeldError: the run is being trained.
    """
    folder = folder_of(storage)
    before = [r.name for r in list_steps(folder) if r.state == "partial" and folder.renames]
    with _owned(folder):
        # Listed again, since a run may have ended meanwhile; taking the lease has removed some of them already.
        left = [r.name for r in list_steps(folder) if is_leftover(r.name)]
        for name in left:
            folder.remove(name)
        left = sorted({*before, *left})
        done = [f"removed the incomplete {name}" for name in left]
        done += Leftovers(folder, HeartbeatMonitor(), _LEASE_S).clear()
        catalog = Catalog(folder, _LEASE_S)
        others = {r.step for r in list_steps(folder) if r.state == "other version"}
        done += [f"step {step} is of another version of regrow and stays as it is" for step in sorted(others)]
        for step in catalog.candidates():
            report = _verify_one(folder.child(step_folder_name(step)), 4, _Reading(0)) if step not in others else None
            if report is not None and report["problems"]:
                done += catalog.clear_step(step, report["problems"][0])
    sound = [r for r in list_steps(folder) if r.state == "complete" and (r.kind == "full" or r.step == 0)]
    if done:
        done.append(f"the newest step to continue from is {sound[-1].step}" if sound else "no step is left")
    return done
