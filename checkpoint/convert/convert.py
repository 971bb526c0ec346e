"""From one format to another as a stream: bounded memory, several threads, verified, atomic, resumable after a kill.

Bytes go into `OUT.partial-convert/`, where a journal says which tensors are durable; the rename to `OUT` is the last
act.
"""

import errno
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, final

import torch
import xxhash
from torch import Tensor

from regrow.checkpoint.convert.conversion_plan import OutputPlan, TensorPlacement
from regrow.checkpoint.errors import CheckpointError
from regrow.checkpoint.files import fsync_folder
from regrow.checkpoint.format.hashing import BlockHasher, block_bytes_for
from regrow.checkpoint.format.tensor_source import TensorInfo, TensorSource, segments, whole
from regrow.checkpoint.load.open_source import open_source

__all__ = ["CastSource", "ConversionResult", "check_output", "convert"]

log = logging.getLogger(__name__)

# What one thread holds at a time, a few times over while it casts; a multiple of the hashes' blocks.
PIECE_BYTES = 8 << 20
# Bytes that become durable together, with one line in the journal for each tensor.
_BATCH_BYTES = 64 << 20
_JOURNAL = "journal.jsonl"


@final
class CastSource(TensorSource):
    """A source whose floating-point tensors are given another type.

    Args:
        source: the tensors.
        dtype: for what is floating-point; integers stay.
    """

    def __init__(self, source: TensorSource, dtype: torch.dtype) -> None:
        self.place = source.place
        self._source, self._dtype = source, dtype
        self.infos: Mapping[str, TensorInfo] = {
            n: TensorInfo(dtype=dtype if i.dtype.is_floating_point else i.dtype, shape=i.shape)
            for n, i in source.infos.items()
        }

    def read(self, name: str, box: tuple[tuple[int, int], ...]) -> Tensor:
        """Raises CheckpointError where a value is beyond what the type can hold."""
        value = self._source.read(name, box)
        info = self.infos[name]
        if value.dtype == info.dtype:
            return value
        given = value.to(info.dtype)
        if torch.finfo(info.dtype).max < torch.finfo(value.dtype).max:
            lost = given.isinf() & value.isfinite()
            if lost.any():
                worst = value[lost].abs().max().item()
                raise CheckpointError(
                    f"--dtype (checkpoint.export_dtype) must be able to hold every value, but {name} in {self.place} "
                    f"has {worst:g} and {str(info.dtype).removeprefix('torch.')} ends at "
                    f"{torch.finfo(info.dtype).max:g}; use bfloat16 or float32"
                )
        return given

    def close(self) -> None:
        self._source.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionResult:
    """What was done.

    Attributes:
        out: the file or folder.
        tensors: how many.
        nbytes: of all files that hold tensors.
        resumed: tensors that an earlier, killed conversion had written.
    """

    out: Path
    tensors: int
    nbytes: int
    resumed: int


def check_output(out: Path, nbytes: int) -> None:
    """Whether `out` may be made: new or an empty folder, with room for it.

    Raises:
        CheckpointError: it may not.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise CheckpointError(f"OUT must be new or an empty folder, but {out} is not; choose another or remove it")
    parent = out.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise CheckpointError(f"OUT must lie in a folder, but {parent} is a file; choose another place")
    partial = _partial(out)
    have = sum(f.stat().st_blocks * 512 for f in partial.rglob("*") if f.is_file()) if partial.exists() else 0
    free = shutil.disk_usage(parent).free
    # A little for indices and manifests.
    needed = nbytes + nbytes // 1000 + (1 << 16)
    if needed - have > free:
        raise CheckpointError(
            f"OUT must have room for {needed / 2**20:,.1f} MiB, but {parent} has {free / 2**20:,.1f} MiB free; "
            "free some or choose another disk"
        )


def _partial(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial-convert")


def convert(
    source: TensorSource,
    make_plan: Callable[[Mapping[str, TensorInfo], Path], OutputPlan],
    out: Path,
    *,
    identity: Mapping[str, Any],
    threads: int = 2,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> ConversionResult:
    """Writes all of a source's tensors into `out`.

    Args:
        source: the tensors, named and typed as they shall be.
        make_plan: given the tensors and a folder to work in, where everything goes.
        out: new, or an empty folder.
        identity: what makes this conversion the one that a partial output was of.
        threads: at work on tensors.
        progress: told the bytes done and in all.

    Raises:
        CheckpointError: bad input or output; nothing lies at `out` then.
    """
    check_output(out, sum(i.nbytes for i in source.infos.values()))
    out.parent.mkdir(parents=True, exist_ok=True)
    work = _partial(out)
    existed = work.exists()
    work.mkdir(exist_ok=True)
    journal: _Journal | None = None
    nbytes = 0
    try:
        plan = make_plan(source.infos, work)
        nbytes = plan.nbytes
        journal = _Journal(work, {**identity, "tensors": _identity(plan)}, existed=existed)
        writer = _Writer(source, plan, work, journal, threads, progress)
        resumed = writer.run()
        plan.finish(work, journal.hashes)
        _verify(plan, work, journal.hashes, threads)
    except CheckpointError:
        # Bad input stays bad: what was written is of no use. (A kill or a full disk leaves it for the next try.)
        if journal is not None or not existed:
            _remove(work)
        raise
    except OSError as error:
        if error.errno == errno.ENOSPC:
            _remove(work)
            raise CheckpointError(
                f"OUT must have room for {nbytes / 2**20:,.1f} MiB, but the disk of {out} is full; "
                "free some or choose another disk"
            ) from error
        raise
    finally:
        if journal is not None:
            journal.close()
    _commit(plan, work, out)
    return ConversionResult(out=out, tensors=len(plan.placed), nbytes=plan.nbytes, resumed=resumed)


def _remove(work: Path) -> None:
    shutil.rmtree(work, ignore_errors=True)


def _identity(plan: OutputPlan) -> str:
    """Equal for equal outputs."""
    body = json.dumps([[p.name, str(p.info.dtype), list(p.info.shape), p.file, p.start] for p in plan.placed])
    return str(xxhash.xxh3_128_hexdigest(body.encode()))


def _commit(plan: OutputPlan, work: Path, out: Path) -> None:
    (work / _JOURNAL).unlink()
    fsync_folder(work)
    if plan.single:
        (only,) = plan.files
        if out.is_dir():
            out.rmdir()
        (work / only).rename(out)
        work.rmdir()
    else:
        if out.exists():
            out.rmdir()
        work.rename(out)
    fsync_folder(out.parent)


@final
class _Journal:
    """Which tensors are durable, with their hashes; the first line says of which conversion."""

    def __init__(self, work: Path, identity: Mapping[str, Any], *, existed: bool) -> None:
        self._path = work / _JOURNAL
        self.hashes: dict[str, str] = {}
        first = json.dumps(identity, sort_keys=True)
        lines = self._lines() if existed else []
        if existed and lines and lines[0] != first:
            raise CheckpointError(
                f"{work} must be of the same conversion to be continued, but is of another one; remove it or choose "
                "another OUT"
            ) from None
        for line in lines[1:]:
            row = json.loads(line)
            self.hashes[row["name"]] = row["blocks"]
        self.found = set(self.hashes)
        if not lines:
            self._path.write_text(first + "\n")
        self._file = self._path.open("a")
        self._lock = threading.Lock()

    def _lines(self) -> list[str]:
        """Whole lines; one that a kill cut off is dropped from the file."""
        if not self._path.exists():
            return []
        body = self._path.read_bytes()
        body = body[: body.rfind(b"\n") + 1]
        self._path.write_bytes(body)
        return body.decode().splitlines()

    def add(self, hashes: Mapping[str, str]) -> None:
        """Notes durable tensors, durably."""
        with self._lock:
            for name, blocks in hashes.items():
                self._file.write(json.dumps({"name": name, "blocks": blocks}) + "\n")
                self.hashes[name] = blocks
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Ends it; may be called twice."""
        self._file.close()


@final
class _Writer:
    """Writes the tensors that the journal does not have yet."""

    def __init__(
        self,
        source: TensorSource,
        plan: OutputPlan,
        work: Path,
        journal: _Journal,
        threads: int,
        progress: Callable[[int, int], None],
    ) -> None:
        self._source, self._plan, self._work, self._journal = source, plan, work, journal
        self._threads, self._progress = threads, progress
        self._done, self._total = 0, sum(p.info.nbytes for p in plan.placed)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._files: dict[str, int] = {}

    def run(self) -> int:
        """Returns how many tensors were there already."""
        for file, size in self._plan.files.items():
            self._files[file] = os.open(self._work / file, os.O_RDWR | os.O_CREAT, 0o644)
            os.ftruncate(self._files[file], size)
        try:
            for file, position, body in self._plan.fixed:
                _pwrite(self._files[file], memoryview(body), position)
            self._run_batches()
            for descriptor in self._files.values():
                os.fsync(descriptor)
        finally:
            for descriptor in self._files.values():
                os.close(descriptor)
        return len(self._journal.found)

    def _run_batches(self) -> None:
        with ThreadPoolExecutor(self._threads) as pool:
            jobs = [pool.submit(self._batch, batch) for batch in self._batches()]
            done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
            # The others stop at their next piece.
            self._stop.set()
            for job in jobs:
                job.cancel()
        for job in done:
            job.result()

    def _batches(self) -> list[list[TensorPlacement]]:
        """Neighbours in a file, about as much as becomes durable together."""
        batches: list[list[TensorPlacement]] = []
        filled = 0
        for placed in self._plan.placed:
            if placed.name in self._journal.found:
                self._advance(placed.info.nbytes)
                continue
            if not batches or batches[-1][0].file != placed.file or filled + placed.info.nbytes > _BATCH_BYTES:
                batches.append([])
                filled = 0
            batches[-1].append(placed)
            filled += placed.info.nbytes
        return batches

    def _batch(self, batch: list[TensorPlacement]) -> None:
        hashes = {placed.name: self._tensor(placed) for placed in batch}
        os.fdatasync(self._files[batch[0].file])
        self._journal.add(hashes)

    def _tensor(self, placed: TensorPlacement) -> str:
        """Copies one tensor; returns the hashes of its blocks."""
        position, info = placed.start, placed.info
        hasher = BlockHasher(block_bytes_for(info.nbytes))
        for box in segments(whole(info.shape), info.dtype.itemsize, PIECE_BYTES):
            if self._stop.is_set():
                raise CancelledError
            value = self._source.read(placed.name, box).contiguous()
            body = _raw(value)
            _pwrite(self._files[placed.file], body, position)
            position += len(body)
            hasher.update(body)
            self._advance(len(body))
        return hasher.blocks()

    def _advance(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            self._progress(self._done, self._total)


class CancelledError(Exception):
    """Another thread failed; its error is the one to tell."""


def _raw(value: Tensor) -> memoryview:
    return memoryview(cast(Any, value.reshape(-1).view(torch.uint8).numpy()))


def _pwrite(descriptor: int, data: memoryview, position: int) -> None:
    done = 0
    while done < len(data):
        written = os.pwrite(descriptor, data[done:], position + done)
        if written == 0:
            raise OSError(errno.EIO, "the file system wrote nothing")
        done += written


def _verify(plan: OutputPlan, work: Path, hashes: Mapping[str, str], threads: int) -> None:
    """Reads the output with its format's own reader and compares every byte with what was meant.

    Raises:
        CheckpointError: a byte differs.
    """
    with (
        open_source(work / next(iter(plan.files)) if plan.single else work) as made,
        ThreadPoolExecutor(threads) as pool,
    ):
        expected = {p.name: p.info for p in plan.placed}
        if dict(made.infos) != expected:
            raise CheckpointError(
                f"{work} does not hold what was written to it; the disk may be failing, use another"
            )
        jobs = {p.name: pool.submit(_hashes_of, made, p) for p in plan.placed}
        wrong = [name for name, job in jobs.items() if job.result() != hashes[name]]
    if wrong:
        raise CheckpointError(f"{wrong[0]} in {work} is not what was written; the disk may be failing, use another")


def _hashes_of(source: TensorSource, placed: TensorPlacement) -> str:
    hasher = BlockHasher(block_bytes_for(placed.info.nbytes))
    for box in segments(whole(placed.info.shape), placed.info.dtype.itemsize, PIECE_BYTES):
        hasher.update(_raw(source.read(placed.name, box).contiguous()))
    return hasher.blocks()
