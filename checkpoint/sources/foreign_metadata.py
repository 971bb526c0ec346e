"""DCP's `.metadata` of a folder that others wrote, as a description of our own: nothing in it is run.

Its pickle is parsed into inert records (`regrow.checkpoint.format.inert_pickle`), which a schema then reads; it knows
what DCP has written since torch 2.0.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from regrow.checkpoint.documents import DocumentError, is_file_name, is_flat_name
from regrow.checkpoint.format.inert_pickle import Global, Pairs, PickleReader, Record, describe
from regrow.checkpoint.format.tensor_source import Box, TensorInfo
from regrow.checkpoint.format.tiling import tiles_exactly
from regrow.checkpoint.format.torch_file import TORCH_DTYPES, dtype_of, shape_of

__all__ = ["ForeignChunk", "ForeignMetadata", "ForeignTensor", "Stream", "parse_metadata"]

_DCP = "torch.distributed.checkpoint.metadata"
_METADATA = Global(_DCP, "Metadata")
_INDEX = Global(_DCP, "MetadataIndex")
_TENSOR = Global(_DCP, "TensorStorageMetadata")
_BYTES = Global(_DCP, "BytesStorageMetadata")
_CHUNK = Global(_DCP, "ChunkStorageMetadata")
_INFO = Global("torch.distributed.checkpoint.filesystem", "_StorageInfo")
# Until torch 2.2 DCP took the properties from sharded tensors.
_OLD = "torch.distributed._shard.sharded_tensor.metadata"
_PROPERTIES = (Global(_DCP, "TensorProperties"), Global(_OLD, "TensorProperties"))
_PATHS = [
    Global(module, name)
    # Python 3.13 has its own place for them.
    for module in ("pathlib", "pathlib._local")
    for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
]
_KNOWN = frozenset(
    {
        _METADATA,
        _INDEX,
        _TENSOR,
        _BYTES,
        _CHUNK,
        _INFO,
        *_PROPERTIES,
        *_PATHS,
        Global(_DCP, "StorageMeta"),
        Global(_DCP, "_MEM_FORMAT_ENCODING"),
        Global(_OLD, "MEM_FORMAT_ENCODING"),
        Global("torch", "Size"),
        Global("torch.serialization", "_get_layout"),
        Global("collections", "OrderedDict"),
        # Python 3.11 wrote members of enumerations as attributes for a while.
        Global("builtins", "getattr"),
    }
    | {Global("torch", name) for name in TORCH_DTYPES}
)
_MOST = 1 << 62
# A chunk takes some 100 bytes of the file; a pickle can name the same one again and again.
_BYTES_PER_DIM = 8
_FEW = 1 << 16

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """Where a `torch.save` stream lies.

    Attributes:
        file: its name in the folder.
        start: the first byte there.
        size: bytes.
    """

    file: str
    start: int
    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ForeignChunk:
    """A stored box of a tensor, and its stream."""

    box: Box
    stream: Stream


@dataclass(frozen=True, kw_only=True, slots=True)
class ForeignTensor:
    """A tensor whose chunks fill it exactly once."""

    info: TensorInfo
    chunks: tuple[ForeignChunk, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ForeignMetadata:
    """What a DCP folder holds.

    Attributes:
        tensors: by flat name.
        objects: the streams of what is not a tensor, by flat name.
    """

    tensors: Mapping[str, ForeignTensor]
    objects: Mapping[str, Stream]


def parse_metadata(body: bytes, sizes: Mapping[str, int]) -> ForeignMetadata:
    """The description, once it is known to be whole.

    Args:
        body: the file `.metadata`.
        sizes: the folder's files, with their bytes.

    Raises:
        DocumentError: it is not one; the message gives only the reason.
    """
    fields = _fields(PickleReader(body, _KNOWN).load(), (_METADATA,), "it")
    entries = _by_name(fields.get("state_dict_metadata"))
    streams = _streams(fields.get("storage_data"), entries)
    _check_streams([s for by_offset in streams.values() for s in by_offset.values()], sizes)
    tensors: dict[str, ForeignTensor] = {}
    objects: dict[str, Stream] = {}
    left = _FEW + len(body) // _BYTES_PER_DIM
    for name, entry in entries.items():
        if isinstance(entry, Record) and entry.what == _BYTES:
            objects[name] = _only_stream(name, streams[name])
            continue
        fields = _fields(entry, (_TENSOR,), name)
        info = _info(name, fields)
        chunks = fields.get("chunks")
        if not isinstance(chunks, list):
            raise DocumentError(f"{name} has no chunks")
        left -= (1 + len(info.shape)) * len(chunks)
        if left < 0:
            raise DocumentError("it describes more chunks than fit into it")
        tensors[name] = _tensor(name, info, chunks, streams[name])
    return ForeignMetadata(tensors=tensors, objects=objects)


def _fields(value: Any, kinds: tuple[Global, ...], what: str) -> dict[str, Any]:
    """The fields of an instance of DCP's dataclasses."""
    if not isinstance(value, Record) or value.what not in kinds or value.args:
        raise DocumentError(f"{what} must be a {kinds[0].name}, but is {describe(value)}")
    if not isinstance(value.state, Pairs) or not all(isinstance(k, str) for k, _ in value.state.items):
        raise DocumentError(f"{what} has no fields")
    return dict(value.state.items)


def _by_name(value: Any) -> dict[str, Any]:
    """The entries of a mapping from flat names."""
    if not isinstance(value, Pairs):
        raise DocumentError(f"state_dict_metadata must be a mapping, but is {describe(value)}")
    found: dict[str, Any] = {}
    for name, entry in value.items:
        if not isinstance(name, str) or not is_flat_name(name):
            raise DocumentError(f"the name of a tensor must be text of one line, but is {describe(name)}")
        if name in found:
            raise DocumentError(f"it describes {name} twice")
        found[name] = entry
    return found


def _streams(value: Any, entries: Mapping[str, Any]) -> dict[str, dict[tuple[int, ...] | None, Stream]]:
    """The streams by name and offset; an object's has none."""
    if not isinstance(value, Pairs):
        raise DocumentError(f"storage_data must be a mapping, but is {describe(value)}")
    found: dict[str, dict[tuple[int, ...] | None, Stream]] = defaultdict(dict)
    for key, info in value.items:
        index = _fields(key, (_INDEX,), "a key of storage_data")
        name, offset = index.get("fqn"), index.get("offset")
        if not isinstance(name, str) or name not in entries:
            raise DocumentError(f"storage_data has {describe(name)}, which is not described")
        position = None if offset is None else shape_of(offset)
        if position in found[name]:
            raise DocumentError(f"storage_data has {name} twice at {position}")
        found[name][position] = _stream(name, info)
    return found


def _stream(name: str, value: Any) -> Stream:
    fields = _fields(value, (_INFO,), f"the place of {name}")
    file, start, size = (fields.get(key) for key in ("relative_path", "offset", "length"))
    if not isinstance(file, str) or not is_file_name(file):
        raise DocumentError(f"{name} must lie in a file of the folder, but is in {describe(file)}")
    if fields.get("transform_descriptors"):
        raise DocumentError(f"{name} is compressed or encrypted; save it without DCP's extensions")
    if type(start) is not int or type(size) is not int or not 0 <= start <= _MOST or not 0 <= size <= _MOST:
        raise DocumentError(
            f"{name} must lie at a place in {file}, but at {describe(start)} are {describe(size)} bytes"
        )
    return Stream(file=file, start=start, size=size)


def _check_streams(streams: Iterable[Stream], sizes: Mapping[str, int]) -> None:
    """Every stream lies within its file, and none within another."""
    by_file: dict[str, list[Stream]] = defaultdict(list)
    for stream in streams:
        by_file[stream.file].append(stream)
    for file, found in by_file.items():
        if file not in sizes:
            raise DocumentError(f"it names the file {file}, which is not there")
        found.sort(key=lambda s: (s.start, s.size))
        end = 0
        for stream in found:
            if stream.start < end:
                raise DocumentError(f"two of its parts overlap in {file}")
            end = stream.start + stream.size
        if end > sizes[file]:
            raise DocumentError(f"{file} must have {end} bytes, but has {sizes[file]}")


def _only_stream(name: str, streams: Mapping[tuple[int, ...] | None, Stream]) -> Stream:
    if len(streams) != 1:
        raise DocumentError(f"{name} must be stored once, but is {len(streams)} times")
    return next(iter(streams.values()))


def _info(name: str, fields: Mapping[str, Any]) -> TensorInfo:
    properties = fields.get("properties")
    if not isinstance(properties, Record) or properties.what not in _PROPERTIES:
        raise DocumentError(f"{name} has no dtype")
    state = properties.state
    if not isinstance(state, tuple) or len(state) != 5:
        raise DocumentError(f"{name} has no dtype")
    info = TensorInfo(dtype=_named(name, dtype_of, state[0]), shape=_named(name, shape_of, fields.get("size")))
    if info.nbytes > _MOST:
        raise DocumentError(f"{name} has the shape {info.shape}, which no file can hold")
    return info


def _tensor(
    name: str, info: TensorInfo, chunks: Sequence[Any], streams: Mapping[tuple[int, ...] | None, Stream]
) -> ForeignTensor:
    boxes = [_box(name, chunk, info.shape) for chunk in chunks]
    if not tiles_exactly(info.shape, boxes):
        raise DocumentError(f"the chunks of {name} do not fill it exactly once")
    # A rank without rows of a tensor has an empty chunk, which need not be stored.
    filled = [box for box in boxes if all(start < stop for start, stop in box)]
    found = tuple(_stored(name, info, box, streams) for box in filled)
    others = streams.keys() - {_offset(box) for box in boxes}
    if others:
        raise DocumentError(f"storage_data has a part of {name} that is none of its chunks")
    return ForeignTensor(info=info, chunks=found)


def _offset(box: Box) -> tuple[int, ...]:
    return tuple(start for start, _ in box)


def _stored(name: str, info: TensorInfo, box: Box, streams: Mapping[tuple[int, ...] | None, Stream]) -> ForeignChunk:
    offset = _offset(box)
    stream = streams.get(offset)
    if stream is None:
        raise DocumentError(f"the chunk of {name} at {offset} is not stored")
    nbytes = info.dtype.itemsize * math.prod(stop - start for start, stop in box)
    if stream.size < nbytes:
        raise DocumentError(f"the chunk of {name} at {offset} has {nbytes} bytes, but {stream.size} are stored")
    return ForeignChunk(box=box, stream=stream)


def _box(name: str, value: Any, shape: tuple[int, ...]) -> Box:
    fields = _fields(value, (_CHUNK,), f"a chunk of {name}")
    offsets, sizes = (_named(name, shape_of, fields.get(key)) for key in ("offsets", "sizes"))
    if len(offsets) != len(shape) or len(sizes) != len(shape):
        raise DocumentError(f"a chunk of {name} has {len(offsets)} dimensions, but the tensor has {len(shape)}")
    return tuple((o, o + n) for o, n in zip(offsets, sizes, strict=True))


def _named(name: str, parse: Callable[[Any], T], value: Any) -> T:
    """A value of a tensor's; the error has its name."""
    try:
        return parse(value)
    except DocumentError as error:
        raise DocumentError(f"{name}: {error}") from None
