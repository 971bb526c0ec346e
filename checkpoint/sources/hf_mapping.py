"""One source seen through a map of names: ours from Hugging Face's, and the other way round."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Protocol, final

import torch
from torch import Tensor

from regrow.checkpoint.errors import CheckpointError
from regrow.checkpoint.format.tensor_source import Box, TensorInfo, TensorSource

__all__ = ["FromHfSource", "Key", "ToHfSource", "halves_to_pairs", "pairs_to_halves"]


class Rows(Protocol):
    """Which rows of a fused tensor are one of ours: `count` blocks from `first` on, of the `blocks` of each group."""

    @property
    def groups(self) -> int:
        """How many there are."""
        ...

    @property
    def blocks(self) -> int:
        """In a group, of equal height."""
        ...

    @property
    def first(self) -> int:
        """The number of the first block that is ours."""
        ...

    @property
    def count(self) -> int:
        """How many are ours."""
        ...


class Key(Protocol):
    """One entry of a map; `regrow.models.hf.HfKey` is the one there is."""

    @property
    def name(self) -> str:
        """Our name."""
        ...

    @property
    def hf_name(self) -> str:
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

    @property
    def rows(self) -> Rows | None:
        """Ours are some of theirs' rows."""
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


def _block_height(rows: Rows, height: int, what: str) -> int:
    """Of one block, in rows."""
    if height % (rows.groups * rows.blocks):
        raise CheckpointError(
            f"{what} must have a multiple of {rows.groups * rows.blocks} rows, but has {height}; use the model that "
            "it belongs to"
        )
    return height // (rows.groups * rows.blocks)


def _check_there(source: TensorSource, names: Sequence[str]) -> None:
    missing = [n for n in names if n not in source.infos]
    if missing:
        raise CheckpointError(
            f"{source.place} must hold {missing[0]}, but does not ({len(missing)} of {len(names)} are missing); "
            "use the model that it belongs to"
        )


@final
class FromHfSource(TensorSource):
    """Our tensors, read from a source that has their names.

    Args:
        source: has their names.
        keys: the map; what it does not name is left out.
        strict: raise where a name of the map is missing; else the tensor is left out.
    """

    def __init__(self, source: TensorSource, keys: Sequence[Key], *, strict: bool = True) -> None:
        if strict:
            _check_there(source, [k.hf_name for k in keys])
        self.place = source.place
        self._source = source
        self._keys: dict[str, list[Key]] = defaultdict(list)
        for key in sorted(keys, key=lambda k: k.expert or 0):
            self._keys[key.name].append(key)
        complete = {n: ks for n, ks in self._keys.items() if all(k.hf_name in source.infos for k in ks)}
        self.infos: Mapping[str, TensorInfo] = {name: self._info(ks) for name, ks in complete.items()}

    def _info(self, keys: Sequence[Key]) -> TensorInfo:
        key, info = keys[0], self._source.infos[keys[0].hf_name]
        if key.expert is not None:
            return TensorInfo(dtype=info.dtype, shape=(len(keys), *info.shape))
        if key.rows is None or not info.shape:
            return info
        height = _block_height(key.rows, info.shape[0], f"{key.hf_name} in {self.place}")
        return TensorInfo(dtype=info.dtype, shape=(key.rows.groups * key.rows.count * height, *info.shape[1:]))

    @property
    def unused(self) -> list[str]:
        """Their names that the map does not have."""
        used = {k.hf_name for ks in self._keys.values() for k in ks}
        return [n for n in self._source.infos if n not in used]

    def read(self, name: str, box: Box) -> Tensor:
        keys = self._keys[name]
        if keys[0].expert is not None:
            return torch.stack([self._source.read(k.hf_name, box[1:]) for k in keys[box[0][0] : box[0][1]]])
        (key,) = keys
        if key.rows is not None and box:
            return torch.cat([self._source.read(key.hf_name, (run, *box[1:])) for run in self._runs(key, box[0])])
        if not key.heads:
            return self._source.read(key.hf_name, box)
        head_dim = self.infos[name].shape[0] // key.heads
        wide = _heads_box(box, head_dim)
        rows = halves_to_pairs(self._source.read(key.hf_name, wide), head_dim)
        return rows[box[0][0] - wide[0][0] : box[0][1] - wide[0][0]]

    def _runs(self, key: Key, rows: tuple[int, int]) -> list[tuple[int, int]]:
        """Theirs' rows that are some of ours, in as few runs as there are."""
        assert key.rows is not None
        groups = key.rows
        height = self._source.infos[key.hf_name].shape[0] // (groups.groups * groups.blocks)
        own, period, origin = groups.count * height, groups.blocks * height, groups.first * height
        runs = []
        for group in range(rows[0] // own, -(-rows[1] // own)):
            low, high = max(rows[0], group * own), min(rows[1], (group + 1) * own)
            shift = group * (period - own) + origin
            runs.append((low + shift, high + shift))
        return runs

    def close(self) -> None:
        self._source.close()


@final
class ToHfSource(TensorSource):
    """Their tensors, read from a source that has our names.

    Args:
        source: has our names.
        keys: the map; what it does not name is left out.
    """

    def __init__(self, source: TensorSource, keys: Sequence[Key]) -> None:
        _check_there(source, [k.name for k in keys])
        self.place = source.place
        self._source = source
        self._keys: dict[str, list[Key]] = defaultdict(list)
        for key in sorted(keys, key=lambda k: k.rows.first if k.rows else 0):
            self._keys[key.hf_name].append(key)
        # In the order of the map.
        self.infos: Mapping[str, TensorInfo] = {k.hf_name: self._info(self._keys[k.hf_name]) for k in keys}

    def _info(self, keys: Sequence[Key]) -> TensorInfo:
        info = self._source.infos[keys[0].name]
        if keys[0].expert is not None:
            return TensorInfo(dtype=info.dtype, shape=info.shape[1:])
        if keys[0].rows is None or not info.shape:
            return info
        rows = sum(self._source.infos[k.name].shape[0] for k in keys)
        return TensorInfo(dtype=info.dtype, shape=(rows, *info.shape[1:]))

    def read(self, name: str, box: Box) -> Tensor:
        keys = self._keys[name]
        key = keys[0]
        if key.rows is not None and box:
            return torch.cat([self._source.read(ours, (run, *box[1:])) for ours, run in self._runs(keys, box[0])])
        if key.expert is not None:
            return self._source.read(key.name, ((key.expert, key.expert + 1), *box)).squeeze(0)
        if not key.heads:
            return self._source.read(key.name, box)
        head_dim = self.infos[name].shape[0] // key.heads
        wide = _heads_box(box, head_dim)
        rows = pairs_to_halves(self._source.read(key.name, wide), head_dim)
        return rows[box[0][0] - wide[0][0] : box[0][1] - wide[0][0]]

    def _runs(self, keys: Sequence[Key], rows: tuple[int, int]) -> list[tuple[str, tuple[int, int]]]:
        """Our names and rows that one after another are some of theirs' rows."""
        runs = []
        first = keys[0].rows
        assert first is not None
        height = self._source.infos[keys[0].name].shape[0] // (first.groups * first.count)
        period = first.blocks * height
        for group in range(rows[0] // period, -(-rows[1] // period)):
            for key in keys:
                assert key.rows is not None
                origin = group * period + key.rows.first * height
                low, high = max(rows[0], origin), min(rows[1], origin + key.rows.count * height)
                shift = group * key.rows.count * height - origin
                if low < high:
                    runs.append((key.name, (low + shift, high + shift)))
        return runs

    def close(self) -> None:
        self._source.close()
