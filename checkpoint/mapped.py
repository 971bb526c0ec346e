"""One source seen through a map of names: ours from Hugging Face's, and the other way round."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Protocol, final

import torch
from torch import Tensor

from checkpoint.errors import CheckpointError
from checkpoint.source import Box, TensorInfo, TensorSource

__all__ = ["ForwardSource", "InverseSource", "Key", "halves_to_pairs", "pairs_to_halves"]


class Key(Protocol):
    """One entry of a map; `models.hf.HfKey` is the one there is."""

    @property
    def ours(self) -> str:
        """Our name."""
        ...

    @property
    def theirs(self) -> str:
        """The name on their disk."""
        ...

    @property
    def heads(self) -> int:
        """Above 0: rows are heads, whose halves they keep apart and we interleave."""
        ...

    @property
    def expert(self) -> int | None:
        """Theirs is this slice of ours in dimension 0."""
        ...


def halves_to_pairs(rows: Tensor, head_dim: int) -> Tensor:
    """Whole heads' rows from Hugging Face's order (i, i + H/2 rotate together) to Meta's (2i, 2i + 1)."""
    return rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def pairs_to_halves(rows: Tensor, head_dim: int) -> Tensor:
    """The inverse of `halves_to_pairs`."""
    return rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _heads_box(box: Box, head_dim: int) -> Box:
    """The box, widened to whole heads."""
    start, stop = box[0]
    return ((start // head_dim * head_dim, -(-stop // head_dim) * head_dim), *box[1:])


def _check_there(source: TensorSource, names: Sequence[str]) -> None:
    missing = [n for n in names if n not in source.infos]
    if missing:
        raise CheckpointError(
            f"{source.place} must hold {missing[0]}, but does not ({len(missing)} of {len(names)} are missing); "
            "use the model that it belongs to"
        )


@final
class ForwardSource(TensorSource):
    """Our tensors, read from a source that has their names.

    Args:
        source: has their names.
        keys: the map; what it does not name is left out.
        strict: raise where a name of the map is missing; else the tensor is left out.
    """

    def __init__(self, source: TensorSource, keys: Sequence[Key], *, strict: bool = True) -> None:
        if strict:
            _check_there(source, [k.theirs for k in keys])
        self.place = source.place
        self._source = source
        self._keys: dict[str, list[Key]] = defaultdict(list)
        for key in sorted(keys, key=lambda k: k.expert or 0):
            self._keys[key.ours].append(key)
        complete = {n: ks for n, ks in self._keys.items() if all(k.theirs in source.infos for k in ks)}
        self.infos: Mapping[str, TensorInfo] = {name: self._info(ks) for name, ks in complete.items()}

    def _info(self, keys: Sequence[Key]) -> TensorInfo:
        info = self._source.infos[keys[0].theirs]
        if keys[0].expert is None:
            return info
        return TensorInfo(dtype=info.dtype, shape=(len(keys), *info.shape))

    @property
    def unused(self) -> list[str]:
        """Their names that the map does not have."""
        used = {k.theirs for ks in self._keys.values() for k in ks}
        return [n for n in self._source.infos if n not in used]

    def read(self, name: str, box: Box) -> Tensor:
        keys = self._keys[name]
        if keys[0].expert is not None:
            return torch.stack([self._source.read(k.theirs, box[1:]) for k in keys[box[0][0] : box[0][1]]])
        (key,) = keys
        if not key.heads:
            return self._source.read(key.theirs, box)
        head_dim = self.infos[name].shape[0] // key.heads
        wide = _heads_box(box, head_dim)
        rows = halves_to_pairs(self._source.read(key.theirs, wide), head_dim)
        return rows[box[0][0] - wide[0][0] : box[0][1] - wide[0][0]]

    def close(self) -> None:
        self._source.close()


@final
class InverseSource(TensorSource):
    """Their tensors, read from a source that has our names.

    Args:
        source: has our names.
        keys: the map; what it does not name is left out.
    """

    def __init__(self, source: TensorSource, keys: Sequence[Key]) -> None:
        _check_there(source, [k.ours for k in keys])
        self.place = source.place
        self._source = source
        self._keys = {k.theirs: k for k in keys}
        infos = {}
        for key in keys:
            info = source.infos[key.ours]
            shape = info.shape if key.expert is None else info.shape[1:]
            infos[key.theirs] = TensorInfo(dtype=info.dtype, shape=shape)
        self.infos: Mapping[str, TensorInfo] = infos

    def read(self, name: str, box: Box) -> Tensor:
        key = self._keys[name]
        if key.expert is not None:
            return self._source.read(key.ours, ((key.expert, key.expert + 1), *box)).squeeze(0)
        if not key.heads:
            return self._source.read(key.ours, box)
        head_dim = self.infos[name].shape[0] // key.heads
        wide = _heads_box(box, head_dim)
        rows = pairs_to_halves(self._source.read(key.ours, wide), head_dim)
        return rows[box[0][0] - wide[0][0] : box[0][1] - wide[0][0]]

    def close(self) -> None:
        self._source.close()
