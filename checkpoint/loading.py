"""Loading a step, ours or anybody's, into existing tensors.

Ours are read by their manifests, and every byte is verified before it is copied. Those written by others (plain
DCP, torchtitan's) go through the stock reader, without verification, and without running what a pickle holds.
"""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from checkpoint.catalog import Catalog, step_folder_name
from checkpoint.contents import StoredItem, stored_items
from checkpoint.errors import CheckpointError, DamagedStepError
from checkpoint.manifest import MANIFEST, Manifest, read_manifest
from checkpoint.reader import check_names, read_tensors

__all__ = [
    "check_compatible",
    "is_verified",
    "load_tensors",
    "read_foreign_metadata",
    "read_items",
    "resolve_foreign",
]


def is_verified(path: Path) -> bool:
    """Whether a step has a manifest, so that what is read from it can be verified."""
    return (path / MANIFEST).exists()


def read_items(path: Path, manifest: Manifest) -> list[StoredItem]:
    """What all ranks wrote into a step.

    Raises:
        DamagedStepError: a small file does not match its hash.
    """
    items: list[StoredItem] = []
    for name, expected in manifest.hashes.items():
        body = (path / name).read_bytes()
        if xxhash.xxh3_128_hexdigest(body) != expected:
            raise DamagedStepError(f"{path / name} does not match its hash; the step is damaged, use another one")
        if name.startswith("rank-"):
            items += stored_items(json.loads(body))
    return items


def load_tensors(path: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup) -> None:
    """Reads a step into existing tensors, resharding to whatever layout they have.

    Args:
        path: the step's folder.
        tensors: by flat name; DTensors receive this rank's part.
        group: on the CPU; used for checkpoints without a manifest alone.

    Raises:
        CheckpointError: a name is missing there, or has another shape or dtype.
        DamagedStepError: a byte is not what was written.
    """
    if is_verified(path):
        read_tensors(path, read_items(path, read_manifest(path)), tensors)
        return
    _check_against(path, _SafeReader(path).read_metadata().state_dict_metadata, tensors)
    try:
        dcp.load(dict(tensors), storage_reader=_SafeReader(path), process_group=group)
    except CheckpointException as error:
        raise CheckpointError(f"loading {path} failed: {_causes(error)}") from error


def check_compatible(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Whether a step holds these names with these shapes and dtypes; reads no tensor.

    Raises:
        CheckpointError: it does not.
    """
    if is_verified(path):
        check_names(path, read_items(path, read_manifest(path)), tensors)
    else:
        _check_against(path, _SafeReader(path).read_metadata().state_dict_metadata, tensors)


# What a `.metadata` may name; anything else is refused before it is called.
_ALLOWED = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch", "memory_format"),
    ("torch.serialization", "_get_layout"),
    ("torch._utils", "_rebuild_device"),
    ("torch.distributed.checkpoint.metadata", "*"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("pathlib", "PosixPath"),
}


class _RestrictedUnpickler(pickle.Unpickler):
    """Knows the classes of DCP's metadata alone."""

    def find_class(self, module: str, name: str) -> Any:
        known = (module, name) in _ALLOWED or (module, "*") in _ALLOWED or (module == "torch" and name in _DTYPES)
        if not known or "." in name:
            raise CheckpointError(
                f".metadata must hold DCP's own classes, but names {module}.{name}; do not trust this checkpoint"
            )
        return super().find_class(module, name)


_DTYPES = {
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int32", "int16", "int8",
    "uint8", "bool", "strided", "preserve_format", "contiguous_format",
}  # fmt: skip


class _SafeReader(FileSystemReader):
    """The stock reader with the restricted unpickler; tensors are read with `weights_only=True` already."""

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                metadata = _RestrictedUnpickler(file).load()
        except (OSError, EOFError, pickle.UnpicklingError, UnicodeDecodeError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{path.parent} is not a checkpoint ({error}); give a folder with .metadata"
            ) from error
        if not isinstance(metadata, Metadata):
            raise CheckpointError(f"{path} holds no DCP metadata; give another checkpoint")
        return metadata


def read_foreign_metadata(path: Path) -> Metadata:
    """DCP's description of a folder that others wrote, read without running what a pickle can hold.

    Raises:
        CheckpointError: it is none.
    """
    return _SafeReader(path).read_metadata()


def _check_against(path: Path, stored: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    missing = [name for name in tensors if name not in stored]
    if missing:
        raise CheckpointError(
            f"{path} must hold {missing[0]}, but does not ({len(missing)} of {len(tensors)} names are missing); "
            "use the model it was saved from, or exclude that part with checkpoint.exclude_from_loading"
        )
    for name, tensor in tensors.items():
        entry = stored[name]
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"{name} in {path} must be a tensor, but is not; give another checkpoint")
        if tuple(entry.size) != tuple(tensor.shape):
            raise CheckpointError(
                f"{name} in {path} has shape {tuple(entry.size)}, but the model's has {tuple(tensor.shape)}; "
                "use the model's dimensions that it was saved with"
            )
        if entry.properties.dtype != tensor.dtype:
            raise CheckpointError(
                f"{name} in {path} is {entry.properties.dtype}, but the model's is {tensor.dtype}; "
                "convert the checkpoint first"
            )


def _causes(error: CheckpointException) -> str:
    return "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in sorted(error.failures.items()))


def resolve_foreign(path: Path) -> Path:
    """The checkpoint meant by `checkpoint.initial_load_path`: a step, or the newest step below a run.

    Raises:
        CheckpointError: there is none.
    """
    path = path.expanduser()
    for folder in (path, path / "checkpoint"):
        if (folder / ".metadata").is_file():
            return folder
        for step in reversed(Catalog(folder).candidates()):
            if (folder / step_folder_name(step) / ".metadata").is_file():
                return folder / step_folder_name(step)
    raise CheckpointError(
        f"checkpoint.initial_load_path must be a checkpoint, or a folder with steps, but {path} holds no "
        ".metadata; check the path"
    )
