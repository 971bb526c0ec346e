"""Loading a step, ours or anybody's, into existing tensors.

Ours are read by their manifests, and every byte is verified before it is copied. Those written by others (plain
DCP, torchtitan's) go through the stock reader, without verification, and without running what a pickle holds.
"""

import logging
import pickle
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from checkpoint.catalog import Catalog
from checkpoint.contents import StoredItem, parse_rank_manifest, rank_manifest_name
from checkpoint.documents import DocumentError
from checkpoint.errors import CheckpointError, DamagedStepError
from checkpoint.manifest import MANIFEST, Manifest, read_manifest
from checkpoint.plan import chunk_of, writer_of
from checkpoint.read_plan import check_names, covered
from checkpoint.reader import read_tensors
from checkpoint.step_name import METADATA, step_folder_name
from checkpoint.storage.base import Storage
from checkpoint.storage.local import LocalStorage
from checkpoint.storage.opening import as_storage

__all__ = [
    "check_compatible",
    "is_incomplete",
    "is_verified",
    "load_tensors",
    "read_foreign_metadata",
    "read_items",
    "resolve_foreign",
]

log = logging.getLogger(__name__)

Place = Storage | Path | str


def is_verified(place: Place) -> bool:
    """Whether a step has a manifest, so that what is read from it can be verified."""
    return as_storage(place).exists(MANIFEST)


def read_items(place: Place, manifest: Manifest) -> list[StoredItem]:
    """What all ranks wrote into a step.

    Raises:
        DamagedStepError: a small file does not match its hash.
    """
    storage = as_storage(place)
    _check_hash(storage, METADATA, manifest)
    return _items_of(storage, manifest, range(manifest.ranks))


def _items_of(storage: Storage, manifest: Manifest, ranks: Iterable[int]) -> list[StoredItem]:
    return [item for rank in ranks for item in _items_of_rank(storage, manifest, rank)]


def _items_of_rank(storage: Storage, manifest: Manifest, rank: int) -> list[StoredItem]:
    name = rank_manifest_name(rank, manifest.writer)
    try:
        items = parse_rank_manifest(_check_hash(storage, name, manifest))
    except DocumentError as error:
        raise DamagedStepError(f"{storage.url}/{name} is damaged ({error}); use another step") from error
    strange = next((item.file for item in items if item.file not in manifest.files), None)
    if strange is not None:
        raise DamagedStepError(
            f"{storage.url}/{name} names {strange}, which the step does not have; use another step"
        )
    return items


def _check_hash(storage: Storage, name: str, manifest: Manifest) -> bytes:
    expected = manifest.hashes.get(name)
    # A file of another size than the manifest's is never read.
    body = storage.read(name, manifest.files.get(name, 0)) if expected else b""
    if expected is None or xxhash.xxh3_128_hexdigest(body) != expected:
        raise DamagedStepError(f"{storage.url}/{name} does not match its hash; the step is damaged, use another one")
    return body


def _needed_items(
    storage: Storage, manifest: Manifest, tensors: Mapping[str, Tensor], group: dist.ProcessGroup
) -> list[StoredItem]:
    """The items that a load reads; under the layout that wrote them, a few ranks' manifests hold them all."""
    ranks = dist.get_world_size(group)
    if ranks == manifest.ranks and ranks > 1:
        writers = sorted({writer_of(name, tensor, range(ranks)) for name, tensor in tensors.items()})
        items = _items_of(storage, manifest, writers)
        by_name: dict[str, list[StoredItem]] = defaultdict(list)
        for item in items:
            by_name[item.name].append(item)
        if all(
            by_name[name]
            and all(item.global_shape == tuple(tensor.shape) for item in by_name[name])
            and covered(by_name[name], chunk_of(name, tensor))
            for name, tensor in tensors.items()
        ):
            return items
    return _items_of(storage, manifest, range(manifest.ranks))


def load_tensors(
    place: Place, tensors: Mapping[str, Tensor], group: dist.ProcessGroup, known: Collection[str] | None = None
) -> int:
    """Reads a step into existing tensors, resharding to whatever layout they have.

    Args:
        place: the step's folder.
        tensors: by flat name; DTensors receive this rank's part.
        group: of all ranks, on the CPU; communicates for checkpoints without a manifest alone.
        known: every name that the model has, on whichever rank; a weight of another name is then an error.

    Returns:
        The bytes that this rank read.

    Raises:
        CheckpointError: a name is missing there, or is not known, or has another shape or dtype.
        DamagedStepError: a byte is not what was written.
    """
    storage = as_storage(place)
    if is_verified(storage):
        first = dist.get_rank(group) == 0
        manifest = read_manifest(storage, check_files=first)
        if first:
            _check_hash(storage, METADATA, manifest)
        items = _needed_items(storage, manifest, tensors, group)
        if known is not None:
            _check_known(storage.url, items, known)
        return read_tensors(storage, items, tensors)
    reader = _SafeReader(_local_path(storage))
    metadata = reader.read_metadata()
    _check_against(storage.url, metadata.state_dict_metadata, tensors)
    try:
        dcp.load(dict(tensors), storage_reader=reader, process_group=group)
    except CheckpointException as error:
        raise CheckpointError(f"loading {storage.url} failed: {_causes(error)}") from error
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _check_known(url: str, items: Iterable[StoredItem], known: Collection[str]) -> None:
    """Whether the model has all weights that are stored; the optimizer's state goes with them."""
    others = ("optimizer.", "train_state.")
    found = sorted({i.name for i in items if i.name not in known and not i.name.startswith(others)})
    if found:
        raise CheckpointError(
            f"{url} must hold the model's weights alone, but holds {found[0]} ({len(found)} such names); use the "
            "model it was saved from, or start from it with checkpoint.initial_load_path and "
            "checkpoint.load_strict=false"
        )


def check_compatible(place: Place, tensors: Mapping[str, Tensor]) -> None:
    """Whether a step holds these names with these shapes and dtypes; reads no tensor.

    Raises:
        CheckpointError: it does not.
    """
    storage = as_storage(place)
    if is_verified(storage):
        check_names(storage.url, read_items(storage, read_manifest(storage)), tensors)
    else:
        stored = _SafeReader(_local_path(storage)).read_metadata().state_dict_metadata
        _check_against(storage.url, stored, tensors)


def _local_path(storage: Storage) -> Path:
    if not isinstance(storage, LocalStorage):
        raise CheckpointError(
            f"a checkpoint without {MANIFEST} must lie in a local folder, but is {storage.url}; copy it first"
        )
    return storage.path


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


def _check_against(path: str, stored: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
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


def resolve_foreign(place: Place) -> Storage:
    """The checkpoint meant by `checkpoint.initial_load_path`: a step, or the newest step below a run.

    Raises:
        CheckpointError: there is none.
    """
    storage = as_storage(place)
    if storage.exists(MANIFEST):
        return storage
    if storage.exists(METADATA):
        _check_foreign(storage)
        return storage
    others: list[str] = []
    for folder in (storage, storage.child("checkpoint")):
        catalog = Catalog(folder)
        for step in reversed(catalog.candidates()):
            try:
                return catalog.open(step).place
            except DamagedStepError as error:
                log.warning("step %d in %s is passed over: %s", step, folder.url, error)
                others += [step_folder_name(step)] if folder.exists(f"{step_folder_name(step)}/{METADATA}") else []
    if others:
        raise CheckpointError(
            "checkpoint.initial_load_path must name a step exactly where no manifest proves that it is complete, "
            f"but is {storage.url}; if another program wrote it, give the path of its folder {others[0]}"
        )
    raise CheckpointError(
        f"checkpoint.initial_load_path must be a checkpoint, or a folder with steps, but {storage.url} holds no "
        ".metadata; check the path"
    )


def _check_foreign(step: Storage) -> None:
    """Refuses a step of a run of ours that has lost its manifest, or never had one: it is incomplete.

    Raises:
        CheckpointError: it is one.
    """
    if not is_incomplete(step):
        return
    raise CheckpointError(
        f"{step.url} must have its {MANIFEST}, because a run of Regrow wrote it, but has not: the step is "
        "incomplete; use another one"
    )


def is_incomplete(step: Storage) -> bool:
    """Whether a folder without a manifest is what is left of a step of ours, and not somebody else's checkpoint."""
    if step.exists(MANIFEST):
        return False
    if any(name.startswith("rank-") and name.endswith(".json") for name in step.names()):
        return True
    around = step.parent()
    return around is not None and (
        any(name.startswith("lease-") for name in around.names())
        or any(around.exists(f"{step_folder_name(n)}/{MANIFEST}") for n in Catalog(around).candidates())
    )
