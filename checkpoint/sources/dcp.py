"""A DCP folder that others wrote as a source: nothing is verified, and nothing in it is run."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from regrow.checkpoint.documents import DocumentError
from regrow.checkpoint.errors import CheckpointError
from regrow.checkpoint.format.step_name import METADATA
from regrow.checkpoint.format.tensor_source import Box, TensorInfo, TensorSource
from regrow.checkpoint.format.torch_file import StoredTensor, TorchArchive, plain_value
from regrow.checkpoint.sources.foreign_metadata import ForeignChunk, Stream, parse_metadata
from regrow.checkpoint.storage.base import RangeReader, Storage
from regrow.checkpoint.storage.local import LocalStorage
from regrow.checkpoint.storage.opening import as_storage

__all__ = ["DcpSource"]


@final
class DcpSource(TensorSource):
    """The tensors of a DCP folder.

    Args:
        location: holds `.metadata`; local.

    Attributes:
        objects: the flat names of what is stored there beside tensors.

    Raises:
        CheckpointError: it is not one, or is incomplete.
    """

    def __init__(self, location: Storage | Path | str) -> None:
        storage = as_storage(location)
        if not isinstance(storage, LocalStorage):
            raise CheckpointError(
                f"a checkpoint without manifest.json must lie in a local folder, but is {storage.url}; copy it first"
            )
        self.place = storage.url
        try:
            metadata = parse_metadata(storage.read(METADATA), storage.sizes())
        except OSError as error:
            raise CheckpointError(
                f"{storage.url} must be a checkpoint, but its {METADATA} cannot be read ({error.strerror}); "
                "check the path"
            ) from error
        except DocumentError as error:
            raise CheckpointError(
                f"{storage.url}/{METADATA} must be a description by DCP, but {error}; do not trust this checkpoint, "
                "or copy it again"
            ) from error
        self.infos: Mapping[str, TensorInfo] = {n: t.info for n, t in metadata.tensors.items()}
        self.objects = tuple(metadata.objects)
        self._tensors, self._objects = metadata.tensors, metadata.objects
        self._storage = storage
        self._found: dict[Stream, StoredTensor] = {}

    def shards(self, name: str) -> int:
        """In how many chunks a tensor lies there."""
        return len(self._tensors[name].chunks)

    def read(self, name: str, box: Box) -> Tensor:
        out = torch.empty([stop - start for start, stop in box], dtype=self.infos[name].dtype)
        for chunk in self._tensors[name].chunks:
            common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, chunk.box, strict=True))
            if any(start >= stop for start, stop in common):
                continue
            target = out
            for dim, ((start, stop), (origin, _)) in enumerate(zip(common, box, strict=True)):
                target = target.narrow(dim, start - origin, stop - start)
            target.copy_(self._read_chunk(name, chunk, common))
        return out

    def read_object(self, name: str) -> Any:
        """What is stored beside tensors, where it is made of numbers, text, lists, tuples and mappings alone.

        Raises:
            CheckpointError: it is something else, or cannot be read.
        """
        stream = self._objects[name]
        try:
            with self._open(stream.file) as file:
                return plain_value(TorchArchive(file, stream.start, stream.size).value)
        except DocumentError as error:
            raise self._unreadable(name, stream, error) from error

    def _read_chunk(self, name: str, chunk: ForeignChunk, box: Box) -> Tensor:
        """A box (in the whole tensor) out of one stored chunk."""
        inner = tuple((a - o, b - o) for (a, b), (o, _) in zip(box, chunk.box, strict=True))
        with self._open(chunk.stream.file) as file:
            stored = self._stored(file, name, chunk)
            return stored.read(file, inner, f"{name} in {self.place}/{chunk.stream.file}")

    def _stored(self, file: RangeReader, name: str, chunk: ForeignChunk) -> StoredTensor:
        """Where a chunk's numbers lie; found out once."""
        stream = chunk.stream
        stored = self._found.get(stream)
        if stored is None:
            try:
                archive = TorchArchive(file, stream.start, stream.size)
                stored = archive.tensor(archive.value)
                shape = tuple(stop - start for start, stop in chunk.box)
                if stored.info != TensorInfo(dtype=self.infos[name].dtype, shape=shape):
                    raise DocumentError(f"it is {stored.info.dtype} of shape {stored.info.shape} there")
            except DocumentError as error:
                raise self._unreadable(name, stream, error) from error
            self._found[stream] = stored
        return stored

    def _unreadable(self, name: str, stream: Stream, error: DocumentError) -> CheckpointError:
        return CheckpointError(
            f"{name} in {self.place}/{stream.file} must be as {METADATA} says, but is not ({error}); use another "
            "checkpoint, or copy it again"
        )

    @contextmanager
    def _open(self, name: str) -> Iterator[RangeReader]:
        """A file, for as long as it is read: there can be more of them than a process may keep open."""
        with ExitStack() as opened:
            try:
                file = opened.enter_context(self._storage.open(name))
            except OSError as error:
                raise CheckpointError(
                    f"{self.place}/{name} must be a file that can be read, but is not ({error.strerror}); copy "
                    "it again"
                ) from error
            yield file
