"""What a step holds, tensor by tensor: each rank's manifest, and the metadata that stock readers want."""

import itertools
import json
import math
import pickle
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Annotated, NamedTuple

import msgspec
import torch
from msgspec import Meta
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from regrow.checkpoint.documents import Count, DocumentError, FileName, FlatName
from regrow.checkpoint.format.hashing import HASH_CHARS, block_bytes_for, item_hash
from regrow.checkpoint.format.layout import SavePlan
from regrow.torch_compat import StorageInfo

__all__ = [
    "DTYPES",
    "StoredChunk",
    "metadata_bytes",
    "metadata_of",
    "parse_rank_manifest",
    "rank_manifest",
    "rank_manifest_name",
]


# By the name that stands in a manifest.
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
    and re.fullmatch(r"torch\.(bool|u?int\d\d?|b?float\d\d?.*|complex\d+)", str(dtype))
}


class StoredChunk(NamedTuple):
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
        return DTYPES[self.dtype]


def rank_manifest_name(rank: int, writer: str = "") -> str:
    """The file's name in a step.

    Args:
        rank: whose manifest it is.
        writer: see `Manifest`.
    """
    return f"rank-{rank}-{writer}.json" if writer else f"rank-{rank}.json"


def rank_failure_name(rank: int, writer: str = "") -> str:
    """The file that a rank leaves in a step that it could not write, where ranks agree by files; see above."""
    return rank_manifest_name(rank, writer).replace(".json", ".failed")


def rank_manifest(plan: SavePlan, names: Sequence[str], blocks: Sequence[str]) -> bytes:
    """What a rank wrote, as the JSON file that is also its report of success.

    Args:
        plan: its layout.
        names: of its files.
        blocks: of each item in turn, the blocks' hashes.
    """
    items = [
        StoredChunk(
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


Shape = Annotated[tuple[Count, ...], Meta(max_length=64)]


class _Item(msgspec.Struct, frozen=True):
    """A `StoredChunk` as it stands in the document."""

    name: FlatName
    dtype: str
    global_shape: Shape
    offset: Shape
    shape: Shape
    file: FileName
    start: Count
    size: Count
    data: Count
    data_bytes: Count
    hash: str
    block_bytes: Annotated[int, Meta(ge=1, le=1 << 40)]
    blocks: Annotated[str, Meta(pattern=r"^[0-9a-f]*\Z")]


class _RankManifest(msgspec.Struct, frozen=True):
    plan: Annotated[str, Meta(max_length=256)]
    files: dict[FileName, Count]
    items: list[_Item]


_DECODER = msgspec.json.Decoder(_RankManifest)
_FIELDS = StoredChunk._fields


def parse_rank_manifest(body: bytes) -> list[StoredChunk]:
    """The items of a rank's manifest, each within its tensor and its file, none over another.

    Raises:
        DocumentError: it is no JSON, a field is missing or out of its bounds, or fields contradict each other.
    """
    try:
        document = _DECODER.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise DocumentError(str(error)) from None
    items = [StoredChunk(*[getattr(row, name) for name in _FIELDS]) for row in document.items]
    for item in items:
        _check_item(item, document.files)
    _check_streams(items)
    return items


def _check_item(item: StoredChunk, files: dict[str, int]) -> None:
    """Whether an item's fields fit each other.

    Raises:
        DocumentError: they do not.
    """
    dtype, blocks = DTYPES.get(item.dtype), -(-item.data_bytes // item.block_bytes)
    rules = {
        "its dtype": dtype is not None,
        "its number of dimensions": len(item.global_shape) == len(item.offset) == len(item.shape),
        "its box": all(
            o + n <= whole for o, n, whole in zip(item.offset, item.shape, item.global_shape, strict=False)
        ),
        "its bytes": dtype is not None and math.prod(item.shape) * dtype.itemsize == item.data_bytes,
        "its file": item.start + item.size <= files.get(item.file, -1),
        "its place in the file": item.start <= item.data and item.data + item.data_bytes <= item.start + item.size,
        "the number of its hashes": len(item.blocks) == blocks * HASH_CHARS,
        "its hash": item_hash(item.blocks) == item.hash,
    }
    wrong = next((rule for rule, holds in rules.items() if not holds), None)
    if wrong is not None:
        raise DocumentError(f"{wrong} cannot be right: {item.name}")


def _check_streams(items: Sequence[StoredChunk]) -> None:
    """Whether no two streams of a file share bytes.

    Raises:
        DocumentError: two do.
    """
    by_file: dict[str, list[StoredChunk]] = defaultdict(list)
    for item in items:
        by_file[item.file].append(item)
    for stored in by_file.values():
        stored.sort(key=lambda i: i.start)
        for one, other in itertools.pairwise(stored):
            if other.start < one.start + one.size:
                raise DocumentError(f"{one.name} and {other.name} share bytes")


def metadata_of(items: Iterable[StoredChunk]) -> Metadata:
    """DCP's own description of the step, from all ranks' manifests."""
    tensors: dict[str, TensorStorageMetadata] = {}
    storage: dict[MetadataIndex, StorageInfo] = {}
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
        storage[index] = StorageInfo(relative_path=item.file, offset=item.start, length=item.size)
    return Metadata(
        state_dict_metadata=dict(tensors),
        planner_data={name: (name,) for name in tensors},
        storage_data=storage,
    )


def metadata_bytes(items: Iterable[StoredChunk]) -> bytes:
    """The file `.metadata`."""
    return pickle.dumps(metadata_of(items))
