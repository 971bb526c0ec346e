"""Batches on the device before they are used: pinned where they are read, copied beside the step that runs.

A batch is copied on a stream of its own while the device computes the step before, from memory that the host cannot
page out, so that neither the host nor the device waits for it. On a CPU there is nothing of this.
"""

import dataclasses
from typing import final

import torch
from torch import Tensor

from regrow.trainer.data.loader import Batches, MicroBatch, StepBatch
from regrow.trainer.device import is_accelerator

__all__ = ["DeviceFeed", "feed", "pinned"]


def _pinned(x: Tensor) -> Tensor:
    # A copy from memory that is not in one piece would go through pages again.
    return x.contiguous().pin_memory()


def pinned(batch: StepBatch) -> StepBatch:
    """The same in pinned memory; called by the thread that reads."""
    micro_batches = [
        MicroBatch(
            tokens=_pinned(m.tokens),
            labels=_pinned(m.labels),
            documents=None if m.documents is None else m.documents.pin_memory(),
            sources=None if m.sources is None else _pinned(m.sources),
        )
        for m in batch.micro_batches
    ]
    return dataclasses.replace(batch, micro_batches=micro_batches)


def _tensors(micro_batch: MicroBatch) -> list[Tensor]:
    documents = micro_batch.documents
    described = [] if documents is None else [documents.starts, documents.boundaries]
    sources = [] if micro_batch.sources is None else [micro_batch.sources]
    return [micro_batch.tokens, micro_batch.labels, *described, *sources]


def _on(micro_batch: MicroBatch, device: torch.device) -> MicroBatch:
    return MicroBatch(
        tokens=micro_batch.tokens.to(device, non_blocking=True),
        labels=micro_batch.labels.to(device, non_blocking=True),
        documents=None if micro_batch.documents is None else micro_batch.documents.to(device),
        sources=None if micro_batch.sources is None else micro_batch.sources.to(device, non_blocking=True),
    )


@final
class DeviceFeed(Batches):
    """Gives each batch on the device, and has the next one copied meanwhile, if it has been read.

    Args:
        batches: on the host.
        device: where they are used.
    """

    def __init__(self, batches: Batches, device: torch.device) -> None:
        self._batches, self._device = batches, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._ahead: StepBatch | BaseException | None = None

    def ready(self, timeout_s: float) -> bool:
        return self._ahead is not None or self._batches.ready(timeout_s)

    def __next__(self) -> StepBatch:
        batch = self._ahead if self._ahead is not None else self._copied(next(self._batches))
        self._ahead = None
        if isinstance(batch, BaseException):
            raise batch
        self._take_over(batch)
        if self._batches.ready(0.0):
            try:
                self._ahead = self._copied(next(self._batches))
            except BaseException as error:  # raised where the batch is asked for
                self._ahead = error
        return batch

    def _copied(self, batch: StepBatch) -> StepBatch:
        with torch.cuda.stream(self._stream):
            return dataclasses.replace(batch, micro_batches=[_on(m, self._device) for m in batch.micro_batches])

    def _take_over(self, batch: StepBatch) -> None:
        """What runs from here on waits for the copies, and their memory is not given away before it has run."""
        if self._stream is None:
            return
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for micro_batch in batch.micro_batches:
            for tensor in _tensors(micro_batch):
                tensor.record_stream(current)

    def close(self) -> None:
        self._ahead = None
        self._batches.close()


def feed(batches: Batches, device: torch.device) -> Batches:
    """Batches as the device wants them: on a CPU as they are."""
    return DeviceFeed(batches, device) if is_accelerator(device) else batches
