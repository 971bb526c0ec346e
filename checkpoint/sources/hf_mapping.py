"""One source seen through a map of names: a model's from Hugging Face's, and the other way round.

Tensors are renamed, stacked and cut here; what is in another order is brought into order by the map's own transforms.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Protocol, final

import torch
from torch import Tensor

from regrow.checkpoint.errors import CheckpointError
from regrow.checkpoint.format.tensor_source import Box, TensorInfo, TensorSource

__all__ = ["FromHfSource", "Key", "KeyTransform", "Rows", "ToHfSource"]


class KeyTransform(Protocol):
    """Another order of a tensor's rows; the model's family makes it."""

    def needed(self, rows: tuple[int, int], height: int) -> tuple[int, int]:
        """The rows, of `height`, that must be read at once to give the rows asked for: at least those."""
        ...

    def forward(self, rows: Tensor, height: int) -> Tensor:
        """Rows as `needed` gives them, of a tensor of `height`, from Hugging Face's order to the model's."""
        ...

    def inverse(self, rows: Tensor, height: int) -> Tensor:
        """The inverse of `forward`."""
        ...


class Rows(Protocol):
    """Which rows of a fused tensor are the model's: `count` of the `blocks` of each group, from `first` on."""

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
        """The number of the first block that is taken."""
        ...

    @property
    def count(self) -> int:
        """How many are taken."""
        ...


class Key(Protocol):
    """One entry of a map from names to stored names."""

    @property
    def name(self) -> str:
        """In the model."""
        ...

    @property
    def hf_name(self) -> str:
        """In the files."""
        ...

    @property
    def index(self) -> int | None:
        """The stored tensor is this slice of the model's in dimension 0."""
        ...

    @property
    def rows(self) -> Rows | None:
        """The model's tensor is some of the stored one's rows."""
        ...

    @property
    def transform(self) -> KeyTransform | None:
        """Rows are in another order."""
        ...


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
    """A model's tensors, read from a source that has Hugging Face's names.

    Args:
        source: has the names of the files.
        keys: the map; what it does not name is left out.
        strict: raise where a name of the map is missing; else the tensor is left out.
    """

    def __init__(self, source: TensorSource, keys: Sequence[Key], *, strict: bool = True) -> None:
        if strict:
            _check_there(source, [k.hf_name for k in keys])
        self.place = source.place
        self._source = source
        self._keys: dict[str, list[Key]] = defaultdict(list)
        for key in sorted(keys, key=lambda k: k.index or 0):
            self._keys[key.name].append(key)
        complete = {n: ks for n, ks in self._keys.items() if all(k.hf_name in source.infos for k in ks)}
        self.infos: Mapping[str, TensorInfo] = {name: self._info(ks) for name, ks in complete.items()}

    def _info(self, keys: Sequence[Key]) -> TensorInfo:
        key, info = keys[0], self._source.infos[keys[0].hf_name]
        if key.index is not None:
            return TensorInfo(dtype=info.dtype, shape=(len(keys), *info.shape))
        if key.rows is None or not info.shape:
            return info
        height = _block_height(key.rows, info.shape[0], f"{key.hf_name} in {self.place}")
        return TensorInfo(dtype=info.dtype, shape=(key.rows.groups * key.rows.count * height, *info.shape[1:]))

    @property
    def unused(self) -> list[str]:
        """Stored names that the map does not have."""
        used = {k.hf_name for ks in self._keys.values() for k in ks}
        return [n for n in self._source.infos if n not in used]

    def read(self, name: str, box: Box) -> Tensor:
        keys = self._keys[name]
        if keys[0].index is not None:
            return torch.stack([self._source.read(k.hf_name, box[1:]) for k in keys[box[0][0] : box[0][1]]])
        (key,) = keys
        if key.rows is not None and box:
            return torch.cat([self._source.read(key.hf_name, (run, *box[1:])) for run in self._runs(key, box[0])])
        if key.transform is None:
            return self._source.read(key.hf_name, box)
        height, low = self.infos[name].shape[0], box[0][0]
        needed = key.transform.needed(box[0], height)
        rows = key.transform.forward(self._source.read(key.hf_name, (needed, *box[1:])), height)
        return rows[low - needed[0] : box[0][1] - needed[0]]

    def _runs(self, key: Key, rows: tuple[int, int]) -> list[tuple[int, int]]:
        """The stored rows that are some of the model's, in as few runs as there are."""
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
    """Hugging Face's tensors, read from a source that has the model's names.

    Args:
        source: has the model's names.
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
        if keys[0].index is not None:
            return TensorInfo(dtype=info.dtype, shape=info.shape[1:])
        if keys[0].rows is None or not info.shape:
            return info
        rows = sum(self._source.infos[k.name].shape[0] for k in keys)
        return TensorInfo(dtype=info.dtype, shape=(rows, *info.shape[1:]))

    def read(self, name: str, box: Box) -> Tensor:
        keys = self._keys[name]
        key = keys[0]
        if key.rows is not None and box:
            return torch.cat([self._source.read(part, (run, *box[1:])) for part, run in self._runs(keys, box[0])])
        if key.index is not None:
            return self._source.read(key.name, ((key.index, key.index + 1), *box)).squeeze(0)
        if key.transform is None:
            return self._source.read(key.name, box)
        height, low = self.infos[name].shape[0], box[0][0]
        needed = key.transform.needed(box[0], height)
        rows = key.transform.inverse(self._source.read(key.name, (needed, *box[1:])), height)
        return rows[low - needed[0] : box[0][1] - needed[0]]

    def _runs(self, keys: Sequence[Key], rows: tuple[int, int]) -> list[tuple[str, tuple[int, int]]]:
        """The model's names and rows that one after another are some rows of the fused tensor."""
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
