"""The one reduction a step: what ranks must agree on, in slots that have names.

Whoever needs a number of all ranks registers a slot: the loop its loss and the requests to stop, a mixture of experts
its busiest expert, a hook what it likes (in `before_fit`, on every rank). All slots travel in one vector of float64:

    [ device sums and maxima | host sums and maxima ]  all-reduced (sum)
    [ carried ]                                        the same on all ranks already; appended after the reduction

A maximum takes one element a rank, of which each rank fills its own, so that a sum brings them all together. The
vector is copied to the host behind the steps that follow and read one step late.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import groupby
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["PendingReduction", "Slot", "SlotKind", "StepReduction", "pack", "unpack"]


class SlotKind(Enum):
    """What becomes of the ranks' values: added, the largest, or (equal on all ranks already) only carried along."""

    sum = "sum"
    max = "max"
    carry = "carry"


@final
@dataclass(kw_only=True, slots=True, eq=False)
class Slot:
    """A number of all ranks.

    Attributes:
        name: unique.
        kind: see `SlotKind`.
        read: this rank's value, asked for once a step, after the update; a scalar on the device, or a number of the
            host. On every rank it is of the same kind.
        in_row: the value goes into the step's row of metrics under the slot's name; one that is not a number is left
            out.
        value: what the ranks had one step ago; before the first step, what it was registered with.
    """

    name: str
    kind: SlotKind
    read: Callable[[], float | Tensor]
    in_row: bool = False
    value: float = 0.0


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class PendingReduction:
    """A step's reduction, on its way from the device.

    Attributes:
        slots: in the order in which they lie in `values`.
        values: float64, on the host.
        arrived: the device's event after the copy to the host; None on a CPU.
    """

    slots: Sequence[Slot]
    values: Tensor
    arrived: torch.cuda.Event | None


_Piece = tuple[Slot, Tensor | list[float]]


def _piece_of(slot: Slot, rank: int, world_size: int) -> _Piece:
    """What this rank adds to the vector for a slot."""
    value = slot.read()
    if slot.kind is not SlotKind.max:
        return slot, value.reshape(1).to(torch.float64) if isinstance(value, Tensor) else [float(value)]
    if isinstance(value, Tensor):
        spread = torch.zeros(world_size, dtype=torch.float64, device=value.device)
        spread[rank] = value
        return slot, spread
    return slot, [float(value) if r == rank else 0.0 for r in range(world_size)]


def _joined(pieces: Sequence[_Piece], device: torch.device) -> Tensor:
    """The pieces in one vector; neighbours from the host go to the device together."""
    parts: list[Tensor] = []
    for from_host, group in groupby((piece for _, piece in pieces), lambda piece: isinstance(piece, list)):
        if from_host:
            numbers = [number for piece in group for number in piece]
            parts.append(torch.tensor(numbers, dtype=torch.float64).to(device, non_blocking=True))
        else:
            parts += [piece for piece in group if isinstance(piece, Tensor)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64, device=device)


def pack(
    slots: Sequence[Slot], rank: int, world_size: int, device: torch.device
) -> tuple[list[Slot], Tensor, Tensor]:
    """This rank's vectors.

    Args:
        slots: in the order of their registration.
        rank: this one.
        world_size: of all ranks.
        device: where they are reduced.

    Returns:
        The slots in the order of their values; what is to be added over ranks; what is only carried. Both float64.
    """
    pieces = [_piece_of(slot, rank, world_size) for slot in slots]
    # Tensors first: the rounding of a sum over ranks may depend on the place in the vector, so the first slot, the
    # loss, stays the first element whatever hooks register.
    reduced = sorted((p for p in pieces if p[0].kind is not SlotKind.carry), key=lambda p: isinstance(p[1], list))
    carried = [p for p in pieces if p[0].kind is SlotKind.carry]
    order = [slot for slot, _ in (*reduced, *carried)]
    return order, _joined(reduced, device), _joined(carried, device)


def unpack(order: Sequence[Slot], values: Sequence[float], world_size: int) -> None:
    """Gives each slot its value.

    Args:
        order: the slots as `pack` has put them.
        values: the sums over ranks, then what was carried.
        world_size: of all ranks.
    """
    first = 0
    for slot in order:
        size = world_size if slot.kind is SlotKind.max else 1
        slot.value = _largest(values[first : first + size])
        first += size
    assert first == len(values), f"{len(values)} values for {first} places"


def _largest(values: Sequence[float]) -> float:
    return math.nan if any(math.isnan(v) for v in values) else max(values)


@final
class StepReduction:
    """Slots, and the reduction that fills them.

    Args:
        rank: this one.
        world_size: of all ranks.
        device: where the training's own group reduces.
        cpu_group: of all ranks, beside the training's traffic; None for one rank alone.
    """

    def __init__(self, rank: int, world_size: int, device: torch.device, cpu_group: dist.ProcessGroup | None) -> None:
        self._rank, self._world_size = rank, world_size
        self._device, self._cpu_group = device, cpu_group
        self._slots: dict[str, Slot] = {}
        self._complete = False

    def sum(
        self, name: str, read: Callable[[], float | Tensor], *, initial: float = 0.0, in_row: bool = False
    ) -> Slot:
        """Registers a number to be added over ranks; what rank 0 alone decides is 0 on the others."""
        return self._register(Slot(name=name, kind=SlotKind.sum, read=read, value=initial, in_row=in_row))

    def max(
        self, name: str, read: Callable[[], float | Tensor], *, initial: float = 0.0, in_row: bool = False
    ) -> Slot:
        """Registers a number of which the largest of any rank counts."""
        return self._register(Slot(name=name, kind=SlotKind.max, read=read, value=initial, in_row=in_row))

    def carry(
        self, name: str, read: Callable[[], float | Tensor], *, initial: float = 0.0, in_row: bool = False
    ) -> Slot:
        """Registers a number that is the same on all ranks and only has to reach the host."""
        return self._register(Slot(name=name, kind=SlotKind.carry, read=read, value=initial, in_row=in_row))

    def _register(self, slot: Slot) -> Slot:
        if self._complete:
            raise RuntimeError(f"the slot {slot.name} must be registered in before_fit, but training has begun")
        if slot.name in self._slots:
            raise ValueError(f"the slot {slot.name} must be registered once, but is there already; use another name")
        self._slots[slot.name] = slot
        return slot

    def complete(self) -> None:
        """Ends the registration.

        Raises:
            RuntimeError: on all ranks, where one has other slots than another: numbers would change places.
        """
        self._complete = True
        if self._world_size == 1:
            return
        mine = [(slot.name, slot.kind) for slot in self._slots.values()]
        every: list[list[tuple[str, SlotKind]]] = [[] for _ in range(self._world_size)]
        dist.all_gather_object(every, mine, group=self._cpu_group)
        for rank, theirs in enumerate(every):
            if theirs != every[0]:
                names = [", ".join(name for name, _ in ranks) for ranks in (every[0], theirs)]
                raise RuntimeError(
                    f"every rank must register the same slots, but rank 0 has {names[0]} and rank {rank} {names[1]}; "
                    "register them on every rank"
                )

    def start(self) -> PendingReduction:
        """Starts the step's reduction; the device is not waited for."""
        order, reduced, carried = pack(list(self._slots.values()), self._rank, self._world_size, self._device)
        if self._world_size > 1:
            dist.all_reduce(reduced)
        values, arrived = torch.cat([reduced, carried]), None
        if values.device.type == "cuda":
            # Beside the steps that follow: reading it later waits for this copy alone.
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            host.copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
            values = host
        return PendingReduction(slots=order, values=values, arrived=arrived)

    def finish(self, pending: PendingReduction) -> dict[str, float]:
        """Waits for a step's values and gives them to the slots; returns those of the row of metrics, by name."""
        if pending.arrived is not None:
            pending.arrived.synchronize()
        unpack(pending.slots, pending.values.tolist(), self._world_size)
        rows = (slot for slot in pending.slots if slot.in_row and not math.isnan(slot.value))
        return {slot.name: slot.value for slot in rows}

    def now(self, *slots: Slot, on_cpu: bool = False) -> None:
        """Reduces these slots alone, registered or not, and waits; all ranks call it together.

        Args:
            slots: sums and maxima.
            on_cpu: beside the training's traffic, where the device may be busy with other things.
        """
        device = torch.device("cpu") if on_cpu else self._device
        order, reduced, carried = pack(slots, self._rank, self._world_size, device)
        if self._world_size > 1:
            dist.all_reduce(reduced, group=self._cpu_group if on_cpu else None)
        unpack(order, torch.cat([reduced, carried]).tolist(), self._world_size)
