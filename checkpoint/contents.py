"""What a step holds, tensor by tensor: each rank's manifest, and the metadata that stock readers want."""

import json
import pickle
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from checkpoint.hashing import block_bytes_for, item_hash
from checkpoint.plan import SavePlan

__all__ = [
    "StoredItem",
    "metadata_bytes",
    "metadata_of",
    "parse_rank_manifest",
    "rank_manifest",
    "rank_manifest_name",
]


class StoredItem(NamedTuple):
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
        block_bytes: the size of a block.
        blocks: xxh3-128 of each block of raw bytes in hex, one behind the other.
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
    block_bytes: int
    blocks: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        found = getattr(torch, self.dtype)
        assert isinstance(found, torch.dtype)
        return found


def rank_manifest_name(rank: int, writer: str = "") -> str:
    """The file's name in a step.

    Args:
        rank: whose manifest it is.
        writer: see `Manifest`.
    """
    return f"rank-{rank}-{writer}.json" if writer else f"rank-{rank}.json"


def rank_manifest(plan: SavePlan, names: Sequence[str], blocks: Sequence[str]) -> bytes:
    """What a rank wrote, as the JSON file that is also its report of success.

    Args:
        plan: its layout.
        names: of its files.
        blocks: of each item in turn, the blocks' hashes.
    """
    items = [
        StoredItem(
            name=item.chunk.name,
            dtype=str(item.chunk.dtype).removeprefix("torch."),
            global_shape=item.chunk.global_shape,
            offset=item.chunk.offset,
            shape=item.chunk.shape,
            file=names[item.file],
            start=item.start,
            size=item.size,
            data=item.data,
            data_bytes=item.data_bytes,
            hash=item_hash(hashes),
            block_bytes=block_bytes_for(item.data_bytes),
            blocks=hashes,
        )
        for item, hashes in zip(plan.items, blocks, strict=True)
    ]
    files = dict(zip(names, plan.file_bytes, strict=True))
    return json.dumps({"plan": plan.id, "files": files, "items": [i._asdict() for i in items]}).encode()


def parse_rank_manifest(body: bytes) -> list[StoredItem]:
    """The items of a rank's manifest."""
    return [_item(row) for row in json.loads(body)["items"]]


def _item(values: dict[str, Any]) -> StoredItem:
    for name in ("global_shape", "offset", "shape"):
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


def metadata_bytes(items: Iterable[StoredItem]) -> bytes:
    """The file `.metadata`."""
    return pickle.dumps(metadata_of(items))
