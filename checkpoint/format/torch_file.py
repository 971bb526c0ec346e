"""`torch.save` streams, whole files or parts of a `.distcp` file, read so that nothing in them runs.

Such a stream is a zip archive whose members are stored as they are: a pickle, and the raw bytes of each storage.
Files from before torch 1.6 have the same in a row.
"""

import io
import math
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from regrow.checkpoint.documents import LONGEST_FLAT_NAME, DocumentError
from regrow.checkpoint.files import SMALL_FILE_BYTES
from regrow.checkpoint.format.inert_pickle import Global, Pairs, PickleReader, Record, Reference, describe, shortened
from regrow.checkpoint.format.tensor_source import MOST_DIMS, Box, TensorInfo, rows_of
from regrow.checkpoint.storage.base import RangeReader

__all__ = [
    "TORCH_DTYPES",
    "StoredTensor",
    "TorchArchive",
    "dtype_of",
    "plain_value",
    "shape_of",
]

# No file holds more elements.
_MOST = 1 << 60
_DEEPEST = 64
_NAMES_CHARS = 16 << 20
_LARGEST_DIRECTORY = 16 << 20
_MOST_PLAIN = 1_000_000
# A member's header; 26 bytes to the lengths of its name and of its extra field.
_LOCAL_HEADER = struct.Struct("<4s22xHH")
# How files began before torch 1.6: pickles, then the storages, each behind its number of elements.
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_LEGACY_PICKLES = 4 << 20
_COUNT = struct.Struct("<q")

# The dtypes that a tensor can have in a file.
TORCH_DTYPES: Mapping[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16,
        torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
        torch.complex32, torch.complex64, torch.complex128,
        torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
    )
}  # fmt: skip
_STORAGES: Mapping[Global, torch.dtype] = {
    Global("torch", f"{name}Storage"): dtype
    for name, dtype in {
        "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
        "ComplexDouble": torch.complex128, "ComplexFloat": torch.complex64,
        "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
} | {Global("torch.storage", "UntypedStorage"): torch.uint8}  # fmt: skip

_SIZE = Global("torch", "Size")
_TENSOR_V1 = Global("torch._utils", "_rebuild_tensor")
_TENSOR_V2 = Global("torch._utils", "_rebuild_tensor_v2")
_TENSOR_V3 = Global("torch._utils", "_rebuild_tensor_v3")
_PARAMETER = Global("torch._utils", "_rebuild_parameter")
_PARAMETER_WITH_STATE = Global("torch._utils", "_rebuild_parameter_with_state")
_FROM_TYPE = Global("torch._tensor", "_rebuild_from_type_v2")
_DENSE = {_TENSOR_V1, _TENSOR_V2, _TENSOR_V3, _PARAMETER, _PARAMETER_WITH_STATE, _FROM_TYPE}
# Tensors, too, but not rows of numbers that lie in the file.
_OTHERS = {
    Global("torch._utils", f"_rebuild_{kind}")
    for kind in ("qtensor", "sparse_tensor", "meta_tensor_no_storage", "nested_tensor", "wrapper_subclass",
                 "device_tensor_from_numpy", "device_tensor_from_cpu_tensor")
}  # fmt: skip
_KNOWN = frozenset(
    {Global("torch", name) for name in TORCH_DTYPES}
    | set(_STORAGES)
    | _DENSE
    | _OTHERS
    | {
        _SIZE,
        Global("collections", "OrderedDict"),
        Global("collections", "Counter"),
        Global("torch", "Tensor"),
        Global("torch", "device"),
        Global("torch.nn.parameter", "Parameter"),
        Global("torch.serialization", "_get_layout"),
        Global("_codecs", "encode"),
    }
    # Protocol 2 says what Python 2 said.
    | {Global(module, n) for module in ("builtins", "__builtin__") for n in ("bytearray", "complex", "set")}
)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        info: its dtype and shape.
        start: where its first element lies in the file, in bytes.
        stride: elements from one index to the next, for each dimension.
    """

    info: TensorInfo
    start: int
    stride: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements follow each other in row-major order."""
        expected = 1
        for n, stride in zip(reversed(self.info.shape), reversed(self.stride), strict=True):
            if n != 1 and stride != expected:
                return 0 in self.info.shape
            expected *= n
        return True

    def read(self, file: RangeReader, box: Box, what: str) -> Tensor:
        """A box of it, contiguous.

        Args:
            file: holds it.
            box: what is wanted.
            what: the tensor, for messages.

        Raises:
            CheckpointError: the file ends too soon.
        """
        if self.is_contiguous:
            return rows_of(file, self.start, self.info, box, what)
        sizes = [high - low for low, high in box]
        if 0 in sizes:
            return torch.empty(sizes, dtype=self.info.dtype)
        first = sum(low * stride for (low, _), stride in zip(box, self.stride, strict=True))
        span = 1 + sum((n - 1) * stride for n, stride in zip(sizes, self.stride, strict=True))
        itemsize = self.info.dtype.itemsize
        flat = rows_of(
            file,
            self.start + first * itemsize,
            TensorInfo(dtype=self.info.dtype, shape=(span,)),
            ((0, span),),
            what,
        )
        return flat.as_strided(sizes, self.stride).contiguous()


@final
class _Part(io.RawIOBase):
    """A range of a file as a file."""

    def __init__(self, file: RangeReader, start: int, size: int) -> None:
        self._file, self._start, self._size, self._position = file, start, size, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if position < 0:
            raise DocumentError("it points in front of its beginning")
        self._position = position
        return position

    def tell(self) -> int:
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = max(self._size - self._position, 0)
        count = left if size is None or size < 0 else min(size, left)
        if count > _LARGEST_DIRECTORY:
            raise DocumentError("its directory is too large")
        body = bytearray(count)
        got = self._file.read_into(self._start + self._position, memoryview(body))
        self._position += got
        return bytes(body[:got])


@final
class TorchArchive:
    """One stream.

    Args:
        file: holds it.
        start: where it begins there.
        size: its bytes.

    Attributes:
        value: what its pickle describes.

    Raises:
        DocumentError: it is not one, or cannot be read without running it.
    """

    def __init__(self, file: RangeReader, start: int, size: int) -> None:
        self._file, self._start, self._size = file, start, size
        # The bytes of each storage, in a file from before torch 1.6.
        self._members: dict[str, tuple[int, int]] = {}
        self._folder = ""
        self._legacy: dict[str, tuple[int, int]] = {}
        head = bytearray(len(_LEGACY))
        if file.read_into(start, memoryview(head)) == len(head) and head == _LEGACY:
            self._read_legacy()
            return
        self._members = self._read_members()
        pickles = [n for n in self._members if n.endswith("/data.pkl") and n.count("/") == 1]
        if len(pickles) != 1:
            raise DocumentError("it has no pickle where torch.save puts it")
        self._folder = pickles[0].removesuffix("data.pkl")
        order = f"{self._folder}byteorder"
        if order in self._members and self._body(order, 64) != b"little":
            raise DocumentError("its numbers are not little-endian")
        body = self._body(pickles[0], SMALL_FILE_BYTES)
        self._pickle_bytes = len(body)
        self.value = PickleReader(body, _KNOWN).load()

    def _read_legacy(self) -> None:
        """The pickles are a number, a version, the system's numbers, the value, and the storages' names in order."""
        body = bytearray(min(self._size, _LEGACY_PICKLES))
        self._file.read_into(self._start, memoryview(body))
        pickles = bytes(body)
        self._pickle_bytes, position = len(pickles), 0
        values: list[Any] = []
        types: dict[str, torch.dtype] = {}
        for _ in range(5):
            reader = PickleReader(pickles, _KNOWN, position)
            values.append(reader.load())
            position = reader.position
            types |= {key: _STORAGES[what] for key, what, _ in map(_storage_of, reader.references)}
        self.value = values[3]
        system = values[2].items if isinstance(values[2], Pairs) else []
        if ("little_endian", True) not in system or not isinstance(values[4], list):
            raise DocumentError("its numbers are not little-endian")
        for key in values[4]:
            count = bytearray(_COUNT.size)
            if not isinstance(key, str) or key not in types or position + len(count) > self._size:
                raise DocumentError("its storages are not whole")
            self._file.read_into(self._start + position, memoryview(count))
            position += len(count)
            nbytes = _COUNT.unpack(count)[0] * types[key].itemsize
            if not 0 <= nbytes <= self._size - position:
                raise DocumentError("its storages are not whole")
            self._legacy[key] = (self._start + position, nbytes)
            position += nbytes

    def _read_members(self) -> dict[str, tuple[int, int]]:
        """The place of each member's header, and its bytes."""
        try:
            with zipfile.ZipFile(_Part(self._file, self._start, self._size)) as archive:
                found = archive.infolist()
        except DocumentError:
            raise
        except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError, OverflowError, EOFError) as error:
            raise DocumentError(f"its archive cannot be read: {shortened(str(error))}") from None
        members: dict[str, tuple[int, int]] = {}
        for entry in found:
            if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                raise DocumentError(
                    f"its member {shortened(entry.filename)} is compressed, which torch.save's are not"
                )
            if entry.orig_filename in members:
                raise DocumentError(f"it has two members {shortened(entry.filename)}")
            members[entry.orig_filename] = (entry.header_offset, entry.file_size)
        return members

    def _place(self, name: str) -> tuple[int, int]:
        """Where a member's bytes begin in the file, and how many there are."""
        if name not in self._members:
            raise DocumentError(f"it has no member {shortened(name)}")
        position, size = self._members[name]
        header = bytearray(_LOCAL_HEADER.size)
        if not 0 <= position <= self._size - len(header):
            raise DocumentError(f"its member {shortened(name)} is not whole")
        self._file.read_into(self._start + position, memoryview(header))
        magic, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        data = position + len(header) + name_length + extra_length
        if magic != b"PK\x03\x04" or size > self._size - data:
            raise DocumentError(f"its member {shortened(name)} is not whole")
        return self._start + data, size

    def _body(self, name: str, limit: int) -> bytes:
        data, size = self._place(name)
        if size > limit:
            raise DocumentError(f"its member {shortened(name)} has {size} bytes, but at most {limit} are expected")
        body = bytearray(size)
        if self._file.read_into(data, memoryview(body)) < size:
            raise DocumentError(f"its member {shortened(name)} is not whole")
        return bytes(body)

    def tensors(self) -> dict[str, StoredTensor]:
        """All tensors in nested mappings, their keys joined by dots.

        Raises:
            DocumentError: one is not whole, or not dense, or two get one name; or there is nothing of the kind.
        """
        if not isinstance(self.value, Pairs | Record):
            raise DocumentError(f"it holds {describe(self.value)}")
        found: dict[str, StoredTensor] = {}
        # A pickle can name one mapping again and again, and within itself.
        visits, chars = self._pickle_bytes, 0
        waiting: list[tuple[str, Any, int]] = [("", self.value, 0)]
        while waiting:
            name, value, depth = waiting.pop()
            if not isinstance(value, Pairs):
                if name in found:
                    raise DocumentError(f"it has two tensors {shortened(name)}")
                found[name] = self._named_tensor(name, value)
                continue
            children: list[tuple[str, Any, int]] = []
            for child_name, child in _children(name, value):
                visits, chars = visits - 1, chars + len(child_name)
                if visits < 0 or depth > _DEEPEST or len(child_name) > LONGEST_FLAT_NAME or chars > _NAMES_CHARS:
                    raise DocumentError("it nests mappings too deeply, or one in itself")
                children.append((child_name, child, depth + 1))
            waiting += reversed(children)
        return found

    def _named_tensor(self, name: str, value: Record) -> StoredTensor:
        try:
            return self.tensor(value)
        except DocumentError as error:
            raise DocumentError(f"its tensor {shortened(name)} cannot be read: {error}") from None

    def tensor(self, value: Any) -> StoredTensor:
        """The place of one tensor of the pickle's.

        Raises:
            DocumentError: it is not one, or is not in the file.
        """
        for _ in range(4):
            if not isinstance(value, Record) or value.what not in (
                _PARAMETER,
                _PARAMETER_WITH_STATE,
                _FROM_TYPE,
            ):
                break
            # A parameter is its data; a tensor with attributes is made by the function that comes first.
            function, args = (value.args[:1], value.args[2:3]) if value.what == _FROM_TYPE else ((), value.args[:1])
            if not args:
                raise DocumentError("it has too few values")
            value = args[0]
            if function and isinstance(function[0], Global) and isinstance(value, tuple):
                value = Record(function[0], value)
        if not isinstance(value, Record) or value.what not in (_TENSOR_V1, _TENSOR_V2, _TENSOR_V3):
            raise DocumentError(f"it is {describe(value)}, not a dense tensor; save it dense, with memory of its own")
        return self._dense(value)

    def _dense(self, value: Record) -> StoredTensor:
        if len(value.args) < 4:
            raise DocumentError("it has too few values")
        storage, offset, size, stride = value.args[:4]
        dtype, start, count = self._storage(storage)
        if value.what == _TENSOR_V3:
            dtype = dtype_of(value.args[6] if len(value.args) > 6 else None)
        # A storage without a type counts bytes.
        count = count // dtype.itemsize
        shape, steps = shape_of(size), shape_of(stride)
        if len(shape) != len(steps) or not _is_count(offset):
            raise DocumentError(f"it has the shape {shape} and the strides {steps}")
        last = offset + sum((n - 1) * step for n, step in zip(shape, steps, strict=True))
        if 0 not in shape and (last >= count or math.prod(shape) > count):
            raise DocumentError(
                f"it has the shape {shape}, but its storage holds {count} elements; save it with .contiguous()"
            )
        return StoredTensor(
            info=TensorInfo(dtype=dtype, shape=shape), start=start + offset * dtype.itemsize, stride=steps
        )

    def _storage(self, value: Any) -> tuple[torch.dtype, int, int]:
        """A storage's dtype, where it begins in the file, and its bytes."""
        if not isinstance(value, Reference):
            raise DocumentError("it has no storage")
        key, what, count = _storage_of(value)
        dtype = _STORAGES[what]
        start, size = self._legacy[key] if key in self._legacy else self._place(f"{self._folder}data/{key}")
        if count * dtype.itemsize > size:
            raise DocumentError(f"its storage must have {count * dtype.itemsize} bytes, but has {size}")
        return dtype, start, count * dtype.itemsize


def _storage_of(reference: Reference) -> tuple[str, Global, int]:
    """The name of a storage in its file, its type, and how many elements it has."""
    value = reference.value
    if (
        not isinstance(value, tuple)
        or len(value) not in (5, 6)
        or value[0] != "storage"
        or value[5:] not in ((), (None,))
    ):
        raise DocumentError("it refers to what is no storage")
    _, what, key, _, count = value[:5]
    if not isinstance(what, Global) or what not in _STORAGES:
        raise DocumentError("it has no storage of a known type")
    if not isinstance(key, str) or not _is_count(count):
        raise DocumentError("its storage has no name, or no size")
    return key, what, count


def _children(name: str, value: Pairs) -> Iterator[tuple[str, Any]]:
    """The mappings and tensors in a mapping, with their names."""
    prefix = f"{name}." if name else ""
    for key, child in value.items:
        if not isinstance(child, Pairs) and not (isinstance(child, Record) and child.what in _DENSE | _OTHERS):
            continue
        if not isinstance(key, str | int):
            raise DocumentError(f"its keys must be text or numbers, but one is {describe(key)}")
        yield f"{prefix}{key if isinstance(key, str) else shortened(key)}", child


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MOST


def shape_of(value: Any) -> tuple[int, ...]:
    """A pickled shape, offset or stride.

    Raises:
        DocumentError: it is not one.
    """
    if isinstance(value, Record) and value.what == _SIZE and len(value.args) == 1:
        value = value.args[0]
    if not isinstance(value, tuple | list) or len(value) > MOST_DIMS or not all(_is_count(n) for n in value):
        raise DocumentError(f"{describe(value)} is no shape")
    return tuple(value)


def dtype_of(value: Any) -> torch.dtype:
    """A pickled dtype.

    Raises:
        DocumentError: it is not one, or not one that a tensor in a file can have.
    """
    if not isinstance(value, Global) or value.module != "torch" or value.name not in TORCH_DTYPES:
        raise DocumentError(f"{describe(value)} is no dtype")
    return TORCH_DTYPES[value.name]


def plain_value(value: Any) -> Any:
    """A pickle's value as Python's own: None, booleans, numbers, text, lists, tuples, and mappings with text as keys.

    Raises:
        DocumentError: it is something else.
    """
    # Values can share parts, and contain themselves.
    left = _MOST_PLAIN

    def to_dict(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or depth > _DEEPEST:
            raise DocumentError("it is nested too deeply, or too large")
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if type(value) in (list, tuple):
            return type(value)(to_dict(v, depth + 1) for v in value)
        if isinstance(value, Pairs) and all(isinstance(k, str) for k, _ in value.items):
            return {k: to_dict(v, depth + 1) for k, v in value.items}
        raise DocumentError(f"it holds {describe(value)}")

    return to_dict(value, 0)
