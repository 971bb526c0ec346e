"""Safetensors files: their headers, and a source over one file or a folder of shards.

The format is eight bytes of length, a JSON header, and the tensors' raw bytes without gaps
(https://huggingface.co/docs/safetensors).
"""

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, final

import torch
from torch import Tensor

from checkpoint.errors import CheckpointError
from checkpoint.source import Box, TensorInfo, TensorSource

__all__ = ["DTYPES", "INDEX", "SINGLE", "SafetensorsSource", "header_bytes", "read_header", "rows_of"]

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
    file: Path
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


def read_header(path: Path) -> dict[str, _Place]:
    """What a file holds, once its size is known to be right.

    Raises:
        CheckpointError: it is not a safetensors file, or is cut short.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        body = file.read(length) if 0 < length <= _MAX_HEADER else b""
    places = {}
    try:
        if len(body) != length:
            raise ValueError("the header is not whole")
        entries = json.loads(body)
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            info = TensorInfo(dtype=DTYPES[entry["dtype"]], shape=tuple(entry["shape"]))
            first, last = entry["data_offsets"]
            if last - first != info.nbytes:
                raise ValueError(f"{name} has {last - first} bytes for {info.nbytes}")
            places[name] = _Place(info=info, file=path, start=8 + length + first)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} must be a whole safetensors file, but its header cannot be read ({error}); copy it again"
        ) from error
    end = max((p.start + p.info.nbytes for p in places.values()), default=8 + length)
    if size < end:
        raise CheckpointError(
            f"{path} must have {end} bytes, but has {size}: it is cut short; copy or download it again"
        )
    return places


def shards_of(folder: Path) -> dict[str, Path]:
    """The shard that holds each name by the folder's index; empty where it has none.

    Raises:
        CheckpointError: the index cannot be read, or names a shard that is not there.
    """
    index = folder / INDEX
    if not index.exists():
        return {}
    try:
        named: dict[str, str] = json.loads(index.read_text())["weight_map"]
        found = {name: folder / Path(file).name for name, file in named.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} must map names to shards, but does not ({error}); copy it again") from error
    for file in sorted(set(found.values())):
        if not file.is_file():
            raise CheckpointError(
                f"{index} names the shard {file.name}, but {folder} does not hold it; copy or download the shard"
            )
    return found


@final
class SafetensorsSource(TensorSource):
    """The tensors of one file, of the shards that an index names, or of all `.safetensors` files in a folder.

    Args:
        path: the file or the folder.

    Raises:
        CheckpointError: a shard is missing, cut short or not a safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.place = str(path)
        named = shards_of(path) if path.is_dir() else {}
        files = sorted(set(named.values())) or ([path] if path.is_file() else sorted(path.glob("*.safetensors")))
        if not files:
            raise CheckpointError(f"{path} must hold safetensors files, but holds none; check the path")
        self._places = {name: place for file in files for name, place in read_header(file).items()}
        for name, file in named.items():
            if name not in self._places:
                raise CheckpointError(
                    f"{path / INDEX} says that {file.name} holds {name}, but it does not; copy or download it again"
                )
        self.files = files
        self.infos: Mapping[str, TensorInfo] = {name: place.info for name, place in self._places.items()}
        self._open = {file: os.open(file, os.O_RDONLY) for file in files}

    def read(self, name: str, box: Box) -> Tensor:
        place = self._places[name]
        return rows_of(self._open[place.file], place.start, place.info, box, f"{name} in {place.file}")

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open = {}


def rows_of(descriptor: int, start: int, info: TensorInfo, box: Box, what: str) -> Tensor:
    """A box out of raw bytes that begin at `start`: its rows are read whole, then narrowed.

    Raises:
        CheckpointError: the file ends too soon.
    """
    if not box:
        return _read_raw(descriptor, start, info.nbytes, what).view(info.dtype).view(())
    shape, cut = info.shape, box
    # A single index of the first dimensions is one range of bytes further in.
    while len(cut) > 1 and cut[0][1] - cut[0][0] == 1:
        start += cut[0][0] * info.dtype.itemsize * math.prod(shape[1:])
        shape, cut = shape[1:], cut[1:]
    row = info.dtype.itemsize * math.prod(shape[1:])
    first, last = cut[0]
    raw = _read_raw(descriptor, start + first * row, (last - first) * row, what)
    values = raw.view(info.dtype).view(last - first, *shape[1:])
    for dim, (low, high) in enumerate(cut[1:], start=1):
        values = values.narrow(dim, low, high - low)
    return values.contiguous().view([stop - start for start, stop in box])


def _read_raw(descriptor: int, start: int, size: int, what: str) -> Tensor:
    raw = torch.empty(size, dtype=torch.uint8)
    memory = memoryview(cast(Any, raw.numpy()))
    done = 0
    while done < size:
        got = os.preadv(descriptor, [memory[done:]], start + done)
        if got == 0:
            raise CheckpointError(f"{what} is cut short; copy or download it again")
        done += got
    return raw
