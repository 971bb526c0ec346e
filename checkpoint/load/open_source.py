"""Sources for our steps and for one `torch.save` file, and which kind of source a path is."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from regrow.checkpoint.documents import DocumentError
from regrow.checkpoint.errors import CheckpointError
from regrow.checkpoint.format.layout import Chunk
from regrow.checkpoint.format.manifest import MANIFEST, Manifest
from regrow.checkpoint.format.stored_step import StoredStep, chunks_by_name, infos_of, is_verified
from regrow.checkpoint.format.tensor_source import Box, TensorInfo, TensorSource, whole
from regrow.checkpoint.format.torch_file import TorchArchive
from regrow.checkpoint.load.locate import locate_checkpoint
from regrow.checkpoint.load.reader import read_chunk
from regrow.checkpoint.sources.dcp import DcpSource
from regrow.checkpoint.sources.safetensors import SafetensorsSource
from regrow.checkpoint.storage.base import Storage
from regrow.checkpoint.storage.local import LocalStorage
from regrow.checkpoint.storage.opening import as_storage

__all__ = ["DcpSource", "StepSource", "TorchFileSource", "is_hf_folder", "open_source", "read_whole"]

Place = Storage | Path | str
_TORCH_FILES = (".pt", ".pth", ".bin", ".ckpt")


def is_hf_folder(location: Place) -> bool:
    """Whether the folder has weights with Hugging Face's names."""
    names = as_storage(location).names()
    return "config.json" in names and any(n.endswith(".safetensors") for n in names)


def open_source(location: Place) -> TensorSource:
    """The source that a path or URL is: a file, a step, a run (its newest step), or a folder of safetensors.

    Raises:
        CheckpointError: none of these.
    """
    storage = as_storage(location)
    names = storage.names()
    if not names:
        return _open_file(storage)
    if MANIFEST not in names and any(n.endswith(".safetensors") for n in names):
        return SafetensorsSource(storage)
    found = locate_checkpoint(storage)
    if isinstance(found, StoredStep) or is_verified(found):
        return StepSource(found)
    return DcpSource(found)


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
        location: the step's folder, or the step where it was opened before.

    Attributes:
        step: the opened step.
    """

    def __init__(self, location: StoredStep | Place) -> None:
        self.step = location if isinstance(location, StoredStep) else StoredStep.open(location)
        self.place = self.step.url
        self._items = chunks_by_name(self.place, self.step.items())
        self.infos: Mapping[str, TensorInfo] = infos_of(self._items)
        names = sorted({i.file for items in self._items.values() for i in items})
        self._opened = ExitStack()
        self._files = {name: self._opened.enter_context(self.step.storage.open(name)) for name in names}

    @property
    def manifest(self) -> Manifest:
        """The step's."""
        return self.step.manifest

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


@final
class TorchFileSource(TensorSource):
    """One file by `torch.save`, nested dictionaries flattened with dots; only tensors are read, no code is run.

    Args:
        path: the file.

    Raises:
        CheckpointError: it is not one, or its tensors are not in it.
    """

    def __init__(self, path: Path) -> None:
        self.place = str(path)
        with ExitStack() as opened:
            try:
                self._file = opened.enter_context(LocalStorage(path.parent).open(path.name))
                self._tensors = TorchArchive(self._file, 0, path.stat().st_size).tensors()
            except (OSError, DocumentError) as error:
                raise CheckpointError(
                    f"{path} must be a torch.save file of tensors, but is not ({error}); use another file"
                ) from error
            self._opened = opened.pop_all()
        self.infos: Mapping[str, TensorInfo] = {name: t.info for name, t in self._tensors.items()}

    def start_of(self, name: str) -> int:
        """Where a contiguous tensor's bytes begin in the file."""
        tensor = self._tensors[name]
        assert tensor.is_contiguous, "what this reads was made with torch.empty"
        return tensor.start

    def read(self, name: str, box: Box) -> Tensor:
        return self._tensors[name].read(self._file, box, f"{name} in {self.place}")

    def close(self) -> None:
        self._opened.close()


def read_whole(source: TensorSource, name: str) -> Tensor:
    """All of one tensor."""
    return source.read(name, whole(source.infos[name].shape))
