"""Safetensors files: their headers, and a source over one file or a folder of shards.

The format is eight bytes of length, a JSON header, and the tensors' raw bytes without gaps
(https://huggingface.co/docs/safetensors).
"""

import json
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Annotated, Any, final

import torch
from msgspec import Meta
from torch import Tensor

from regrow.checkpoint.documents import (
    Count,
    DocumentError,
    convert_document,
    is_file_name,
    is_flat_name,
    parse_json,
    read_document,
)
from regrow.checkpoint.errors import CheckpointError
from regrow.checkpoint.format.tensor_source import (
    MOST_DIMS,
    Box,
    TensorInfo,
    TensorSource,
    rows_of,
)
from regrow.checkpoint.storage.base import RangeReader, Storage

__all__ = ["DTYPES", "INDEX", "SINGLE", "SafetensorsSource", "header_bytes", "read_header"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """A tensor's info, file and position of its raw bytes in it."""

    info: TensorInfo
    file: str
    start: int


def header_bytes(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """The head of a file that holds these tensors in this order; its length is a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, info in infos.items():
        if info.dtype not in _NAMES:
            raise CheckpointError(
                f"{name} must be of a type that safetensors has ({', '.join(DTYPES)}), but is {info.dtype}; "
                "use --dtype or --format torch"
            )
        end = position + info.nbytes
        entries[name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [position, end]}
        position = end
    body = json.dumps(entries, separators=(",", ":")).encode()
    body += b" " * (-len(body) % 8)
    return struct.pack("<Q", len(body)) + body


def read_header(folder: Storage, name: str, size: int) -> dict[str, _Place]:
    """What a file holds, once its header is known to describe all of it.

    Args:
        folder: holds it.
        name: the file.
        size: in bytes.

    Raises:
        CheckpointError: it is not a safetensors file, or is cut short.
    """
    path = f"{folder.url}/{name}"
    try:
        with folder.open(name) as file:
            length = _length(file)
            body = bytearray(length if 0 < length <= min(_MAX_HEADER, size) else 0)
            got = file.read_into(8, memoryview(body)) if body else 0
        if got != length:
            raise DocumentError("the header is not whole")
        places = _places(bytes(body), name)
    except OSError as error:
        raise CheckpointError(f"{path} must be a file that can be read, but is not ({error.strerror})") from error
    except DocumentError as error:
        raise CheckpointError(
            f"{path} must be a whole safetensors file, but its header cannot be read ({error}); copy it again"
        ) from error
    end = 8 + length + max((p.start + p.info.nbytes for p in places.values()), default=0)
    if size < end:
        raise CheckpointError(
            f"{path} must have {end} bytes, but has {size}: it is cut short; copy or download it again"
        )
    if size > end:
        raise CheckpointError(f"{path} must have {end} bytes, but has {size}; copy or download it again")
    return {tensor: replace(place, start=8 + length + place.start) for tensor, place in places.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """A tensor in a header: bytes `data_offsets[0]` up to `data_offsets[1]` behind it."""

    dtype: str
    shape: Annotated[list[Count], Meta(max_length=MOST_DIMS)]
    data_offsets: tuple[Count, Count]


def _places(body: bytes, file: str) -> dict[str, _Place]:
    """The tensors of a header, which follow each other without gaps; positions count from its end.

    Raises:
        DocumentError: they do not, or it is no header.
    """
    document = parse_json(body)
    if not isinstance(document, dict):
        raise DocumentError("it is not a mapping")
    document.pop("__metadata__", None)
    places: dict[str, _Place] = {}
    for tensor, entry in convert_document(document, dict[str, _Entry]).items():
        if not is_flat_name(tensor):
            raise DocumentError(f"a tensor's name must be text of one line, but is {tensor[:80]!a}")
        if entry.dtype not in DTYPES:
            raise DocumentError(f"{tensor} has the type {entry.dtype[:20]!a}, which is not known")
        info = TensorInfo(dtype=DTYPES[entry.dtype], shape=tuple(entry.shape))
        first, last = entry.data_offsets
        if last - first != info.nbytes:
            raise DocumentError(f"{tensor} has {last - first} bytes for the shape {info.shape}")
        places[tensor] = _Place(info=info, file=file, start=first)
    position = 0
    for tensor, place in sorted(places.items(), key=lambda pair: (pair[1].start, pair[1].info.nbytes)):
        if place.start != position:
            raise DocumentError(f"{tensor} must begin at {position}, but begins at {place.start}")
        position += place.info.nbytes
    return places


def _length(file: RangeReader) -> int:
    start = bytearray(8)
    return int(struct.unpack("<Q", start)[0]) if file.read_into(0, memoryview(start)) == 8 else -1


@dataclass(frozen=True, kw_only=True, slots=True)
class _Index:
    """The file that names the shards: each tensor's."""

    weight_map: dict[str, str]


def _shards(folder: Storage, sizes: Mapping[str, int]) -> dict[str, str]:
    """The shard that holds each name by the folder's index; empty where it has none.

    Raises:
        CheckpointError: the index cannot be read, or names a shard that is not there.
    """
    # transformers takes the single file first, and leaves an older index beside it.
    if INDEX not in sizes or SINGLE in sizes:
        return {}
    try:
        found = read_document(folder.read(INDEX, _MAX_HEADER), _Index).weight_map
        for name, file in found.items():
            if not is_file_name(file) or not name.isprintable():
                raise DocumentError(f"{name[:80]!a} lies in {file[:80]!a}, which is no file beside it")
    except (OSError, DocumentError) as error:
        raise CheckpointError(
            f"{folder.url}/{INDEX} must map names to shards, but does not ({error}); copy it again"
        ) from error
    for file in sorted(set(found.values())):
        if file not in sizes:
            raise CheckpointError(
                f"{folder.url}/{INDEX} names the shard {file}, but the folder does not hold it; copy or download it"
            )
    return found


@final
class SafetensorsSource(TensorSource):
    """The tensors of one file, of the shards that an index names, or of all `.safetensors` files in a folder.

    Args:
        folder: holds the files.
        file: the one to read; None for the folder's.

    Raises:
        CheckpointError: a shard is missing, cut short or not a safetensors file.
    """

    def __init__(self, folder: Storage, file: str | None = None) -> None:
        self.place = folder.url if file is None else f"{folder.url}/{file}"
        sizes = folder.sizes()
        named = _shards(folder, sizes) if file is None else {}
        files = [file] if file is not None else sorted(set(named.values()))
        if not files:
            files = [SINGLE] if SINGLE in sizes else [n for n in sizes if n.endswith(".safetensors")]
        if not files:
            raise CheckpointError(f"{folder.url} must hold safetensors files, but holds none; check the path")
        self._places: dict[str, _Place] = {}
        for shard in files:
            for name, place in read_header(folder, shard, sizes[shard]).items():
                if name in self._places and name not in named:
                    raise CheckpointError(
                        f"{name} in {folder.url} must be in one file, but is in {self._places[name].file} and "
                        f"{shard}; remove what does not belong there"
                    )
                if named.get(name, shard) == shard:
                    self._places[name] = place
        for name, shard in named.items():
            if name not in self._places:
                raise CheckpointError(
                    f"{folder.url}/{INDEX} says that {shard} holds {name}, but it does not; copy or download it again"
                )
        self.infos: Mapping[str, TensorInfo] = {name: place.info for name, place in self._places.items()}
        self._opened = ExitStack()
        self._files = {f: self._opened.enter_context(folder.open(f)) for f in files}

    def read(self, name: str, box: Box) -> Tensor:
        place = self._places[name]
        return rows_of(self._files[place.file], place.start, place.info, box, f"{name} in {self.place}")

    def close(self) -> None:
        self._opened.close()
