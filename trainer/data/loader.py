"""A rank's batches, read ahead in a thread.

A thread measured better than a process: reading a batch is a few copies from mapped memory, less work than handing it
over (`python -m benchmarks.prefetch`, docs/benchmarks.md).
"""

import contextlib
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import final

import numpy as np
import torch
from torch import Tensor

from regrow.models.documents import Documents, describe_documents
from regrow.trainer.data.order import rank_rows
from regrow.trainer.data.samples import SampleIds, Samples
from regrow.trainer.data.windows import IGNORE, Int64s

__all__ = ["Batches", "MicroBatch", "Prefetcher", "StepBatch", "read_rows", "step_batch"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """One forward pass on a rank.

    Attributes:
        tokens: int64 `(micro_batch, seq)`.
        labels: int64 `(micro_batch, seq)`; `IGNORE` where nothing is asked for, as in rows that only fill up.
        documents: where each row's documents begin, or None without a document mask.
        sources: of each row, its place among the names of sources, int64 `(micro_batch,)`; None where there is one.
    """

    tokens: Tensor
    labels: Tensor
    documents: Documents | None
    sources: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBatch:
    """A rank's part of one global batch.

    Attributes:
        micro_batches: as many on every rank.
        ids: the samples this rank read.
        global_ids: those of all ranks.
        labels: of all ranks by source, int64 `(sources,)`: the loss is divided by their sum.
        label_bytes: bytes of text that this rank's labels stand for; 0 where that is not known.
        progress: metrics of where the run is in its data after this batch, by name.
    """

    micro_batches: list[MicroBatch]
    ids: SampleIds
    global_ids: SampleIds
    labels: Int64s
    label_bytes: int = 0
    progress: dict[str, float] = field(default_factory=dict)


def read_rows(samples: Samples, ids: SampleIds, rows: int, *, document_mask: bool) -> MicroBatch:
    """Reads samples into a micro-batch of `rows` rows; what `ids` leaves over is filled and ignored."""
    tokens = np.zeros((rows, samples.seq_len), dtype=np.int64)
    labels = np.full((rows, samples.seq_len), IGNORE, dtype=np.int64)
    described = document_mask or samples.within_documents
    documents = np.zeros((rows, samples.seq_len), dtype=np.int64) if described else None
    for row in range(len(ids)):
        samples.read(ids[row], tokens[row], labels[row], None if documents is None else documents[row])
    sources = None
    if len(samples.names) > 1:
        sources = torch.zeros(rows, dtype=torch.int64)
        sources[: len(ids)] = torch.from_numpy(ids.sources)
    return MicroBatch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        documents=None if documents is None else describe_documents(torch.from_numpy(documents)),
        sources=sources,
    )


def step_batch(
    samples: Samples,
    ids: SampleIds,
    *,
    rank: int,
    ranks: int,
    micro_batch_size: int,
    document_mask: bool,
) -> StepBatch:
    """Cuts the samples of a global batch down to this rank's micro-batches.

    Args:
        samples: of the split.
        ids: the global batch's.
        rank: this rank among those that read different data.
        ranks: how many of them.
        micro_batch_size: rows of a forward pass.
        document_mask: also give each position's document.
    """
    start, stop = rank_rows(len(ids), rank, ranks)
    most_rows = -(-len(ids) // ranks)
    rows = min(micro_batch_size, most_rows)
    own = ids[start:stop]
    micro_batches = [
        read_rows(samples, own[i : i + rows], rows, document_mask=document_mask) for i in range(0, most_rows, rows)
    ]
    return StepBatch(
        micro_batches=micro_batches,
        ids=own,
        global_ids=ids,
        labels=samples.labels(ids),
        label_bytes=sum(samples.bytes_of(m.labels.numpy()) for m in micro_batches),
    )


class Batches(ABC):
    """A rank's batches, one a step."""

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    @abstractmethod
    def __next__(self) -> StepBatch:
        """The next batch, waited for; raises what went wrong in reading it."""

    @abstractmethod
    def ready(self, timeout_s: float) -> bool:
        """Whether the next batch is there, or comes within the time; an error counts as one."""

    @abstractmethod
    def close(self) -> None:
        """Ends what reads ahead."""


@final
class Prefetcher(Batches):
    """Reads the global batches from `samples_consumed` on, `depth` ahead of the training thread.

    Args:
        samples: of the training split.
        samples_consumed: where to begin.
        global_batch_size: sequences a step.
        rank, ranks: see `step_batch`.
        micro_batch_size: see `step_batch`.
        document_mask: see `step_batch`.
        depth: batches ahead, at least 1.
        finish: what else the thread does to a batch; None for nothing.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        samples_consumed: int,
        global_batch_size: int,
        rank: int,
        ranks: int,
        micro_batch_size: int,
        document_mask: bool,
        depth: int,
        finish: Callable[[StepBatch], StepBatch] | None = None,
    ) -> None:
        def read(first: int) -> StepBatch:
            batch = step_batch(
                samples,
                samples.ids(first, global_batch_size),
                rank=rank,
                ranks=ranks,
                micro_batch_size=micro_batch_size,
                document_mask=document_mask,
            )
            batch = replace(batch, progress=samples.progress(first + global_batch_size))
            return batch if finish is None else finish(batch)

        self._queue: queue.Queue[StepBatch | BaseException] = queue.Queue(maxsize=max(1, depth))
        self._ahead: StepBatch | BaseException | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(
            target=self._fill, args=(read, samples_consumed, global_batch_size), name="prefetch", daemon=True
        )
        self._thread.start()

    def _fill(self, read: Callable[[int], StepBatch], first: int, step: int) -> None:
        try:
            while not self._stopped.is_set():
                self._put(read(first))
                first += step
        except BaseException as error:  # handed to the training thread, which raises it
            self._put(error)

    def _put(self, item: StepBatch | BaseException) -> None:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return
            except queue.Full:
                continue

    def ready(self, timeout_s: float) -> bool:
        if self._ahead is None and timeout_s > 0:
            with contextlib.suppress(queue.Empty):
                self._ahead = self._queue.get(timeout=timeout_s)
        return self._ahead is not None or not self._queue.empty()

    def __next__(self) -> StepBatch:
        item = self._ahead if self._ahead is not None else self._queue.get()
        self._ahead = None
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        self._stopped.set()
        self._thread.join()
