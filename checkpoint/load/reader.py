"""Reads a step into existing tensors: only the ranges that they need, every byte verified before it is used.

Each thread reads a run of bytes that follow each other, through a descriptor of its own: the system then reads ahead.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from regrow.checkpoint.format.layout import Chunk, chunk_of, local_tensor
from regrow.checkpoint.format.rank_manifest import StoredChunk
from regrow.checkpoint.format.stored_step import chunks_by_name, infos_of
from regrow.checkpoint.load.read_ops import BlockRange, ReadOp, StridedRead, forget_scratch, requests_of, split_blocks
from regrow.checkpoint.load.read_plan import check_names, plan_reads
from regrow.checkpoint.storage.base import RangeReader, Storage
from regrow.checkpoint.storage.opening import as_storage

__all__ = ["read_chunk", "read_tensors"]

# A tensor's stored chunks, the box of it that is wanted, and the memory for that.
_Wanted = tuple[Sequence[StoredChunk], Chunk, Tensor]


def read_tensors(
    location: Storage | Path | str,
    items: Sequence[StoredChunk],
    tensors: Mapping[str, Tensor],
    *,
    threads: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Fills the tensors' local parts in place; returns the bytes read.

    Args:
        location: the step.
        items: what is stored there.
        tensors: by flat name.
        threads: that read at once; 0 takes what suits the storage and this rank's cores.
        progress: told the bytes read and in all, by each of them.

    Raises:
        CheckpointError: a name is missing, or has another shape or dtype.
        DamagedStepError: naming file and tensor. The tensors' values are then undefined.
    """
    storage = as_storage(location)
    by_name = chunks_by_name(storage.url, items)
    check_names(storage.url, infos_of(by_name), tensors)
    wanted = ((by_name.get(name, []), chunk_of(name, t), local_tensor(t)) for name, t in tensors.items())
    ops = _read_ops(storage.url, wanted, storage.request_bytes)
    shares = list(_shares(ops, threads or _threads(storage))) or [[]]
    tell = _counting(sum(op.stop - op.start for op in ops), progress) if progress is not None else None
    # This thread takes the first share: with as many as there are cores, the system keeps each on its own.
    with ThreadPoolExecutor(max(1, len(shares) - 1), thread_name_prefix="read") as pool:
        others = [pool.submit(_read_share, storage, share, tell) for share in shares[1:]]
        return _read_share(storage, shares[0], tell) + sum(job.result() for job in others)


def read_chunk(
    url: str, files: Mapping[str, RangeReader], items: Sequence[StoredChunk], target: Chunk, local: Tensor
) -> int:
    """Fills one box of a tensor from its stored chunks, verified, in this thread; returns the bytes read.

    Args:
        url: the step, for messages.
        files: opened, by name.
        items: the tensor's stored chunks.
        target: which box.
        local: receives it.
    """
    request_bytes = next(iter(files.values())).request_bytes
    return sum(op.run(files[op.file]) for op in _read_ops(url, [(items, target, local)], request_bytes))


def _read_ops(url: str, wanted: Iterable[_Wanted], request_bytes: int) -> list[ReadOp]:
    """What threads can do apart from each other, in the order of the files' bytes."""
    parts: list[BlockRange] = []
    ops: list[ReadOp] = []
    for items, target, local in wanted:
        if not local.numel():
            continue
        for piece in plan_reads(items, target):
            straight = split_blocks(url, piece, target, local)
            if straight is None:
                ops.append(StridedRead(url, piece, target, local))
            else:
                parts += straight
    parts.sort(key=lambda part: (part.item.file, part.item.data + part.start))
    ops += requests_of(url, parts, request_bytes)
    ops.sort(key=lambda op: (op.file, op.start))
    return ops


def _threads(storage: Storage) -> int:
    """As many reads at once as the storage serves best, and on a disk no more than this rank has cores."""
    if storage.is_remote:
        return storage.streams
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(storage.streams, max(1, cores))


def _shares(ops: Sequence[ReadOp], count: int) -> Iterator[list[ReadOp]]:
    """Cuts what is to be read into runs of about the same number of bytes."""
    total, done, share = sum(op.stop - op.start for op in ops), 0, 1
    run: list[ReadOp] = []
    for op in ops:
        run.append(op)
        done += op.stop - op.start
        if done * count >= total * share:
            yield run
            run, share = [], done * count // total + 1
    if run:
        yield run


def _counting(total: int, progress: Callable[[int, int], None]) -> Callable[[int], None]:
    """Adds up what several threads read."""
    lock, done = threading.Lock(), 0

    def tell(nbytes: int) -> None:
        nonlocal done
        with lock:
            done += nbytes
            progress(done, total)

    return tell


def _read_share(storage: Storage, ops: Sequence[ReadOp], tell: Callable[[int], None] | None) -> int:
    with ExitStack() as opened:
        files = {name: opened.enter_context(storage.open(name)) for name in sorted({op.file for op in ops})}
        try:
            read = 0
            for op in ops:
                read += op.run(files[op.file])
                if tell is not None:
                    tell(op.stop - op.start)
            return read
        finally:
            forget_scratch()
