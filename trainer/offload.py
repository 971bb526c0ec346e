"""Optimizer state in the host's memory, brought to the device and back a part at a time.

The state of all parameters lies in one page-locked memory per kind of state, one parameter behind the other. A part
is a stretch of it, so that a copy is one large transfer, whatever the parameters' sizes are. While one part is
updated, the next one comes and the one before it goes: two buffers on the device are all that it takes.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from regrow.checkpoint.memory import lasting_memory

__all__ = ["HostState", "Part", "Piece", "buffer_bytes", "parts_of"]

# Bytes of a part, of each kind of state: at 50 GiB/s a transfer of 1.3 ms, beside which a launch is nothing.
_PART_BYTES = 64 << 20
# Where a parameter's state begins.
_ALIGNMENT = 64
_BUFFERS = 2


def buffer_bytes(state_bytes: int, kinds: int = 2) -> int:
    """What the buffers take on the device, for so many bytes of each kind of state."""
    return _BUFFERS * kinds * min(_PART_BYTES, state_bytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Rows of one parameter, seen as a matrix whose rows are its last dimension, that lie in a part.

    Attributes:
        name: of the parameter.
        rows: which.
        offset: where they begin in the part, in bytes.
        size: bytes.
        last: whether the parameter ends with them.
    """

    name: str
    rows: slice
    offset: int
    size: int
    last: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A stretch of the memory of each kind of state.

    Attributes:
        start: its first byte.
        stop: one behind its last.
        pieces: what lies in it.
    """

    start: int
    stop: int
    pieces: tuple[Piece, ...]


def parts_of(shapes: Mapping[str, tuple[int, int]], limit: int) -> tuple[list[Part], dict[str, int]]:
    """Lays parameters' states out one behind the other, and cuts that into parts, between rows. Pure.

    Args:
        shapes: rows and bytes of a row, by name, in order.
        limit: bytes that a part has at most, unless one row is longer.

    Returns:
        The parts, and where each parameter's state begins.
    """
    starts: dict[str, int] = {}
    parts: list[Part] = []
    pieces: list[Piece] = []
    first = position = 0

    def close() -> None:
        nonlocal first
        if pieces:
            parts.append(Part(start=first, stop=first + pieces[-1].offset + pieces[-1].size, pieces=tuple(pieces)))
            pieces.clear()
        first = position

    for name, (rows, row_bytes) in shapes.items():
        if row_bytes > limit - (position - first):
            close()
        starts[name], row = position, 0
        while True:
            room = limit - (position - first)
            count = min(rows - row, max(1, room // max(row_bytes, 1)))
            size, end = count * row_bytes, row + count
            pieces.append(
                Piece(name=name, rows=slice(row, end), offset=position - first, size=size, last=end == rows)
            )
            position, row = position + size, end
            if row == rows:
                break
            close()
        position = -(-position // _ALIGNMENT) * _ALIGNMENT
        if position - first >= limit:
            close()
    close()
    return parts, starts


@final
class HostState:
    """State that lies in the host's memory. On a CPU it is moved all the same, within memory.

    Args:
        parameters: this rank's part of each, by name.
        kinds: names of what is kept for each element, in the parameter's dtype.
        part_bytes: see `parts_of`; None takes as many as make a transfer fast.
    """

    def __init__(self, parameters: Mapping[str, Tensor], kinds: Sequence[str], part_bytes: int | None = None) -> None:
        self._parameters = dict(parameters)
        self._parts, starts = parts_of(
            {n: _rows_of(p) for n, p in self._parameters.items()}, part_bytes or _PART_BYTES
        )
        self._device = next((p.device for p in self._parameters.values()), torch.device("cpu"))
        size = max(1, max((part.stop for part in self._parts), default=1))
        # Mapped memory is zero.
        self._memory = {kind: lasting_memory(size, self._device) for kind in kinds}
        self.tensors: dict[str, dict[str, Tensor]] = {
            kind: {n: _view(memory[starts[n] :], p) for n, p in self._parameters.items()}
            for kind, memory in self._memory.items()
        }
        self._buffers: list[dict[str, Tensor]] = []
        self._buffer_bytes = max((part.stop - part.start for part in self._parts), default=1)
        cuda = self._device.type == "cuda"
        self._queue: _Queue | None = _Queue(self._device) if cuda else None

    @torch.no_grad()
    def update(self, work: Callable[[Sequence[Piece], Mapping[str, Mapping[str, Tensor]]], None]) -> None:
        """Brings each part to the device, has it changed there, and takes it back.

        Args:
            work: given a part's pieces, and by kind and name the state of each of them on the device, `(rows,
                columns)`, which it changes in place. What it does is queued on the current stream.
        """
        if not self._buffers:
            self._buffers = [
                {k: torch.empty(self._buffer_bytes, dtype=torch.uint8, device=self._device) for k in self._memory}
                for _ in range(_BUFFERS)
            ]
            if self._queue is not None:
                self._queue.start()
        if self._parts:
            self._bring(0)
        for index, part in enumerate(self._parts):
            if index + 1 < len(self._parts):
                self._bring(index + 1)
            buffer = self._buffers[index % _BUFFERS]
            with _step(self._queue, "work", index % _BUFFERS):
                work(part.pieces, {k: self._on_device(part, b) for k, b in buffer.items()})
            with _step(self._queue, "take", index % _BUFFERS):
                for kind, memory in self._memory.items():
                    memory[part.start : part.stop].copy_(buffer[kind][: part.stop - part.start], non_blocking=True)

    def _bring(self, index: int) -> None:
        part, buffer = self._parts[index], self._buffers[index % _BUFFERS]
        with _step(self._queue, "bring", index % _BUFFERS):
            for kind, memory in self._memory.items():
                buffer[kind][: part.stop - part.start].copy_(memory[part.start : part.stop], non_blocking=True)

    def _on_device(self, part: Part, buffer: Tensor) -> dict[str, Tensor]:
        return {
            p.name: buffer[p.offset : p.offset + p.size]
            .view(self._parameters[p.name].dtype)
            .view(p.rows.stop - p.rows.start, -1)
            for p in part.pieces
            if p.size
        }

    def wait(self) -> None:
        """Returns when the state has come back, so that the host may read it."""
        if self._queue is not None:
            self._queue.wait()


def _rows_of(parameter: Tensor) -> tuple[int, int]:
    """Rows, and bytes of a row."""
    columns = parameter.shape[-1] if parameter.ndim else 1
    return (parameter.numel() // columns if columns else 0), columns * parameter.itemsize


def _view(memory: Tensor, parameter: Tensor) -> Tensor:
    """The beginning of `memory` as a tensor of the parameter's shape and dtype."""
    return memory[: parameter.nbytes].view(parameter.dtype).view(parameter.shape)


@final
class _Queue:
    """A GPU's streams: one on which state comes, one on which it goes; work is done on the current one.

    For each buffer there is an event behind each step, for which the next step waits.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._come, self._go = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]
        self._done: dict[tuple[str, int], Any] = {}

    def start(self) -> None:
        """The buffers' memory may have been used by what is queued on the current stream."""
        for stream in (self._come, self._go):
            stream.wait_stream(torch.cuda.current_stream(self._device))

    def step(self, name: str, buffer: int) -> AbstractContextManager[None]:
        """A step of a buffer; see `_Step`."""
        stream, after = {
            "bring": (self._come, "take"),
            "work": (torch.cuda.current_stream(self._device), "bring"),
            "take": (self._go, "work"),
        }[name]
        return _Step(stream, self._done, (name, buffer), self._done.get((after, buffer)))

    def wait(self) -> None:
        """The host waits for what goes back."""
        self._go.synchronize()


@final
class _Step(AbstractContextManager[None]):
    """What is queued within waits for the step before it, and leaves an event for the one behind it."""

    def __init__(self, stream: Any, done: dict[tuple[str, int], Any], key: tuple[str, int], after: Any) -> None:
        self._stream, self._done, self._key, self._after = stream, done, key, after
        self._within = torch.cuda.stream(stream)

    def __enter__(self) -> None:
        if self._after is not None:
            self._stream.wait_event(self._after)
        self._within.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: object) -> None:
        self._within.__exit__(*error)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        self._done[self._key] = event


def _step(queue: _Queue | None, name: str, buffer: int) -> AbstractContextManager[None]:
    return nullcontext() if queue is None else queue.step(name, buffer)
