"""Sources for our steps, for anybody's DCP folder, and for one `torch.save` file; and which of them a path is."""

import io
import pickle
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from checkpoint.contents import StoredItem
from checkpoint.errors import CheckpointError
from checkpoint.loading import is_verified, read_foreign_metadata, read_items, resolve_foreign
from checkpoint.manifest import read_manifest
from checkpoint.plan import Chunk
from checkpoint.reader import read_chunk
from checkpoint.safetensors_io import SafetensorsSource, rows_of
from checkpoint.source import Box, TensorInfo, TensorSource, whole
from checkpoint.storage.base import RangeReader, Storage
from checkpoint.storage.local import LocalStorage
from checkpoint.storage.opening import as_storage
from checkpoint.stream import frame_of

__all__ = ["DcpSource", "StepSource", "TorchFileSource", "is_hf_folder", "open_source", "read_whole"]

Place = Storage | Path | str
_TORCH_FILES = (".pt", ".pth", ".bin", ".ckpt")


def is_hf_folder(place: Place) -> bool:
    """Whether the folder has weights with Hugging Face's names."""
    names = as_storage(place).names()
    return "config.json" in names and any(n.endswith(".safetensors") for n in names)


def open_source(place: Place) -> TensorSource:
    """The source that a path or URL is: a file, a step, a run (its newest step), or a folder of safetensors.

    Raises:
        CheckpointError: none of these.
    """
    storage = as_storage(place)
    names = storage.names()
    if not names:
        return _open_file(storage)
    if any(n.endswith(".safetensors") for n in names):
        return SafetensorsSource(storage)
    step = resolve_foreign(storage)
    return StepSource(step) if is_verified(step) else DcpSource(step)


def _open_file(storage: Storage) -> TensorSource:
    """A source that is one file; only local ones can be told from folders."""
    path = storage.path if isinstance(storage, LocalStorage) else None
    if path is None or not path.exists():
        raise CheckpointError(f"{storage.url} must be a checkpoint, but does not exist or is empty; check the path")
    if path.is_file() and path.suffix == ".safetensors":
        return SafetensorsSource(LocalStorage(path.parent), path.name)
    if path.is_file() and path.suffix in _TORCH_FILES:
        return TorchFileSource(path)
    raise CheckpointError(
        f"{path} must be a .safetensors or {', '.join(_TORCH_FILES)} file or a folder with a checkpoint, but is not; "
        "check the path"
    )


@final
class StepSource(TensorSource):
    """One of our steps; every byte is verified.

    Args:
        place: the step's folder.
    """

    def __init__(self, place: Place) -> None:
        storage = as_storage(place)
        self.place = storage.url
        self.manifest = read_manifest(storage)
        self._items: dict[str, list[StoredItem]] = defaultdict(list)
        for item in read_items(storage, self.manifest):
            self._items[item.name].append(item)
        self.infos: Mapping[str, TensorInfo] = {
            name: TensorInfo(dtype=items[0].torch_dtype, shape=items[0].global_shape)
            for name, items in self._items.items()
        }
        names = sorted({i.file for items in self._items.values() for i in items})
        self._opened = ExitStack()
        self._files = {name: self._opened.enter_context(storage.open(name)) for name in names}

    def shards(self, name: str) -> int:
        """In how many chunks a tensor lies there."""
        return len(self._items[name])

    def read(self, name: str, box: Box) -> Tensor:
        info = self.infos[name]
        shape = tuple(stop - start for start, stop in box)
        local = torch.empty(shape, dtype=info.dtype)
        target = Chunk(
            name=name,
            dtype=info.dtype,
            global_shape=info.shape,
            offset=tuple(start for start, _ in box),
            shape=shape,
        )
        read_chunk(self.place, self._files, self._items[name], target, local)
        return local

    def close(self) -> None:
        self._opened.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stream:
    """A stored chunk of a DCP folder: its box, and where its `torch.save` stream lies."""

    box: Box
    file: str
    start: int
    size: int


@final
class DcpSource(TensorSource):
    """A DCP folder that others wrote: nothing is verified, and nothing in it is run.

    Args:
        place: holds `.metadata`; local.
    """

    def __init__(self, place: Place) -> None:
        storage = as_storage(place)
        if not isinstance(storage, LocalStorage):
            raise CheckpointError(
                f"a checkpoint without manifest.json must lie in a local folder, but is {storage.url}; copy it first"
            )
        self.place, path = storage.url, storage.path
        metadata = read_foreign_metadata(path)
        self.infos: Mapping[str, TensorInfo] = {
            name: TensorInfo(dtype=entry.properties.dtype, shape=tuple(entry.size))
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._streams = _streams_of(path, metadata)
        self._opened = ExitStack()
        self._files: dict[str, RangeReader] = {}
        for file in sorted({s.file for streams in self._streams.values() for s in streams}):
            if not storage.exists(file):
                raise CheckpointError(f"{path / file} must be there, but is not; copy it again")
            self._files[file] = self._opened.enter_context(storage.open(file))

    def shards(self, name: str) -> int:
        """In how many chunks a tensor lies there."""
        return len(self._streams[name])

    def read(self, name: str, box: Box) -> Tensor:
        info = self.infos[name]
        out = torch.empty([stop - start for start, stop in box], dtype=info.dtype)
        covered = 0
        for stream in self._streams.get(name, []):
            common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, stream.box, strict=True))
            if any(start >= stop for start, stop in common):
                continue
            part = self._chunk(stream, info, common, name)
            target = out
            for dim, ((start, stop), (origin, _)) in enumerate(zip(common, box, strict=True)):
                target = target.narrow(dim, start - origin, stop - start)
            target.copy_(part)
            covered += part.numel()
        if covered != out.numel():
            raise CheckpointError(f"{name} is not whole in {self.place}; use another checkpoint")
        return out

    def _chunk(self, stream: _Stream, info: TensorInfo, box: Box, name: str) -> Tensor:
        """A box (in the whole tensor) out of one stored chunk."""
        shape = tuple(stop - start for start, stop in stream.box)
        inner = tuple((a - o, b - o) for (a, b), (o, _) in zip(box, stream.box, strict=True))
        file, what = self._files[stream.file], f"{name} in {self.place}/{stream.file}"
        frame = frame_of(info.dtype, shape)
        head = bytearray(len(frame.head))
        if stream.size == frame.size and file.read_into(stream.start, memoryview(head)) and head == frame.head:
            stored = TensorInfo(dtype=info.dtype, shape=shape)
            return rows_of(file, stream.start + len(frame.head), stored, inner, what)
        # Written by another version of torch, or from memory with strides: ask torch's own reader.
        body = bytearray(stream.size)
        file.read_into(stream.start, memoryview(body))
        try:
            loaded = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise CheckpointError(f"{what} cannot be read ({error}); use another checkpoint") from error
        return loaded.detach()[tuple(slice(*d) for d in inner)].contiguous()  # type: ignore[no-any-return]

    def close(self) -> None:
        self._opened.close()


def _streams_of(path: Path, metadata: Metadata) -> dict[str, list[_Stream]]:
    streams: dict[str, list[_Stream]] = defaultdict(list)
    storage: Mapping[Any, Any] = metadata.storage_data
    for index, where in storage.items():
        entry = metadata.state_dict_metadata.get(index.fqn)
        if not isinstance(entry, TensorStorageMetadata) or index.offset is None:
            continue
        if getattr(where, "transform_descriptors", None):
            raise CheckpointError(f"{index.fqn} in {path} is compressed; save it without DCP's extensions")
        chunk = next(c for c in entry.chunks if c.offsets == index.offset)
        box = tuple((o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
        streams[index.fqn].append(_Stream(box=box, file=where.relative_path, start=where.offset, size=where.length))
    return streams


@final
class TorchFileSource(TensorSource):
    """One file by `torch.save`, nested dictionaries flattened with dots; only tensors are read, no code is run.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.place = str(path)
        try:
            # Fake tensors know where their bytes lie in the file, and hold none.
            with FakeTensorMode():
                loaded = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
            raise CheckpointError(f"{path} must be a torch.save file of tensors, but is not ({error})") from error
        self._tensors = dict(_flat(loaded))
        self.infos: Mapping[str, TensorInfo] = {
            name: TensorInfo(dtype=t.dtype, shape=tuple(t.shape)) for name, t in self._tensors.items()
        }
        self._opened = ExitStack()
        self._file = self._opened.enter_context(LocalStorage(path.parent).open(path.name))

    def start_of(self, name: str) -> int:
        """Where a contiguous tensor's bytes begin in the file."""
        tensor = self._tensors[name]
        if not tensor.is_contiguous():
            raise CheckpointError(
                f"{name} in {self.place} must be contiguous, but is not; save it with .contiguous()"
            )
        begin = tensor.untyped_storage()._checkpoint_offset
        assert begin is not None, "torch.load tells where bytes lie"
        return int(begin) + int(tensor.storage_offset()) * tensor.dtype.itemsize

    def read(self, name: str, box: Box) -> Tensor:
        info = self.infos[name]
        return rows_of(self._file, self.start_of(name), info, box, f"{name} in {self.place}")

    def close(self) -> None:
        self._opened.close()


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        return [(prefix.removesuffix("."), value)]
    if isinstance(value, Mapping):
        return [pair for k, v in value.items() for pair in _flat(v, f"{prefix}{k}.")]
    return []


def read_whole(source: TensorSource, name: str) -> Tensor:
    """All of one tensor."""
    return source.read(name, whole(source.infos[name].shape))
