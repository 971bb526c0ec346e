"""What a step holds, tensor by tensor: each rank's manifest, and the metadata that stock readers want."""

import pickle
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from checkpoint.hashing import item_hash
from checkpoint.plan import SavePlan

__all__ = ["StoredItem", "metadata_of", "rank_items", "stored_items", "write_metadata"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredItem:
    """A chunk on the disk.

    Attributes:
        name: the tensor's flat name.
        dtype: as torch spells it, without the prefix.
        global_shape: of the whole tensor.
        offset: where the chunk begins in it.
        shape: of the chunk.
        file: its file's name.
        start: where its stream begins there.
        size: bytes of the stream.
        data: where its raw bytes begin.
        data_bytes: how many.
        hash: over its blocks' hashes.
        blocks: xxh3-128 of each block of raw bytes.
    """

    name: str
    dtype: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int
    size: int
    data: int
    data_bytes: int
    hash: str
    blocks: tuple[str, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        found = getattr(torch, self.dtype)
        assert isinstance(found, torch.dtype)
        return found


def rank_items(plan: SavePlan, file: str, hashes: Mapping[str, list[str]]) -> list[dict[str, Any]]:
    """A rank's manifest as plain values."""
    return [
        asdict(
            StoredItem(
                name=item.chunk.name,
                dtype=str(item.chunk.dtype).removeprefix("torch."),
                global_shape=item.chunk.global_shape,
                offset=item.chunk.offset,
                shape=item.chunk.shape,
                file=file,
                start=item.start,
                size=item.size,
                data=item.data,
                data_bytes=item.data_bytes,
                hash=item_hash(hashes[item.chunk.name]),
                blocks=tuple(hashes[item.chunk.name]),
            )
        )
        for item in plan.items
    ]


def stored_items(rows: Iterable[Mapping[str, Any]]) -> list[StoredItem]:
    """The inverse of `rank_items`."""
    return [_item(dict(row)) for row in rows]


def _item(values: dict[str, Any]) -> StoredItem:
    for name in ("global_shape", "offset", "shape", "blocks"):
        values[name] = tuple(values[name])
    return StoredItem(**values)


def metadata_of(items: Iterable[StoredItem]) -> Metadata:
    """DCP's own description of the step, from all ranks' manifests."""
    tensors: dict[str, TensorStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for item in sorted(items, key=lambda i: (i.name, i.offset)):
        entry = tensors.setdefault(
            item.name,
            TensorStorageMetadata(
                properties=TensorProperties(dtype=item.torch_dtype),
                size=torch.Size(item.global_shape),
                chunks=[],
            ),
        )
        index = MetadataIndex(item.name, torch.Size(item.offset), len(entry.chunks))
        entry.chunks.append(ChunkStorageMetadata(offsets=torch.Size(item.offset), sizes=torch.Size(item.shape)))
        storage[index] = _StorageInfo(relative_path=item.file, offset=item.start, length=item.size)
    return Metadata(
        state_dict_metadata=dict(tensors),
        planner_data={name: (name,) for name in tensors},
        storage_data=storage,
    )


def write_metadata(path: Path, metadata: Metadata) -> None:
    """Writes `.metadata`; the caller flushes it."""
    with path.open("wb") as out:
        pickle.dump(metadata, out)
