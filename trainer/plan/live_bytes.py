"""Which bytes are live at a time, from the operators that are dispatched: no memory is needed to follow them.

A storage counts from the operator that made it until nothing refers to it, views and autograd's saved tensors
included, as an allocator sees it. What a kernel takes and gives back within itself is not seen.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, final

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from regrow.torch_imagined import DispatchMode, device_of_fake, key_of_storage, tree_iter, without_fakes

__all__ = ["Kind", "LiveBytes", "Peak"]


class Kind(Enum):
    """What memory is for."""

    parameters = "parameters"
    gradients = "gradients"
    optimizer = "optimizer state"
    buffers = "buffers and inputs"
    activations = "activations"
    logits = "logits"
    gathered = "gathered parameters"
    communication = "communication"


@dataclass(slots=True)
class Peak:
    """The most that was live in a part of the step.

    Attributes:
        size: bytes.
        kinds: bytes of each kind, at that moment.
    """

    size: int = 0
    kinds: Counter[Kind] = field(default_factory=Counter)


@dataclass(slots=True)
class _Storage:
    size: int
    kind: Kind


@final
class LiveBytes(DispatchMode):  # type: ignore[no-untyped-call]
    """Follows storages on a device while it is entered.

    Attributes:
        live: bytes now, by kind.
        peaks: of each part of the step that was named with `enter`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: Counter[Kind] = Counter()
        self.peaks: dict[str, Peak] = {}
        self.kind = Kind.activations
        self._peak = Peak()
        self._total = 0
        self._keys: dict[int, _Storage] = {}
        self._rules: list[Callable[[Any, Tensor], Kind | None]] = []

    @property
    def total(self) -> int:
        """Bytes now."""
        return self._total

    def enter(self, part: str) -> None:
        """From now on peaks are those of this part of the step."""
        self._peak = self.peaks.setdefault(part, Peak())
        self._look()

    def rule(self, kind_of: Callable[[Any, Tensor], Kind | None]) -> None:
        """Adds a rule that says what an operator's result is for; None leaves it to the next one."""
        self._rules.append(kind_of)

    def mark(self, tensors: Iterator[Tensor] | list[Tensor], kind: Kind) -> None:
        """Says what tensors are for that are there already."""
        for tensor in tensors:
            plain = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            entry = self._keys.get(key_of_storage(plain.untyped_storage()))
            if entry is not None and entry.kind is not kind:
                self.live[entry.kind] -= entry.size
                self.live[kind] += entry.size
                entry.kind = kind

    @contextmanager
    def resizing(self) -> Iterator[None]:
        """While it is entered, storages that are resized are followed: so FSDP frees what it gathered."""
        original = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = original(storage, size)
            entry = self._keys.get(key_of_storage(storage))
            if entry is not None:
                self._change(entry, size, Kind.gathered)
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = original  # type: ignore[method-assign]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            # What it does with its local tensors is looked at.
            return NotImplemented
        if (device := device_of_fake(func, args)) is not None:
            return device
        if _is_real(args):
            # Meshes are tables of ranks, whose numbers are looked at.
            with without_fakes():
                return func(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._note(func, tensor)
        return out

    def _note(self, func: Any, tensor: Tensor) -> None:
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = key_of_storage(storage)
        if key in self._keys:
            return
        kind = next((k for rule in self._rules if (k := rule(func, tensor)) is not None), self.kind)
        entry = self._keys[key] = _Storage(0, kind)
        self._change(entry, storage.nbytes(), kind)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        entry = self._keys.pop(key, None)
        if entry is not None:
            self._change(entry, 0, entry.kind)

    def _change(self, entry: _Storage, size: int, kind: Kind) -> None:
        self.live[entry.kind] -= entry.size
        self.live[kind] += size
        self._total += size - entry.size
        entry.size, entry.kind = size, kind
        self._look()

    def _look(self) -> None:
        if self._total > self._peak.size:
            self._peak.size = self._total
            self._peak.kinds = self.live.copy()


def _is_real(args: tuple[Any, ...]) -> bool:
    """Whether an operator is given tensors, all with values."""
    tensors = [a for a in tree_iter(args) if isinstance(a, Tensor)]
    return bool(tensors) and all(type(t) is Tensor and t.device.type == "cpu" for t in tensors)
