"""Loading a step, ours or anybody's, into existing tensors.

Ours are read by their manifests, and every byte is verified before it is copied. Those written by others (plain
DCP, torchtitan's) are read without verification, and without running what a pickle holds.
"""

import logging
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from regrow.checkpoint.documents import DocumentError
from regrow.checkpoint.errors import CheckpointError, DamagedStepError
from regrow.checkpoint.format.layout import chunk_of, local_tensor, writer_of
from regrow.checkpoint.format.manifest import MANIFEST, Manifest, read_manifest
from regrow.checkpoint.format.rank_manifest import StoredChunk, parse_rank_manifest, rank_manifest_name
from regrow.checkpoint.format.step_name import METADATA, step_folder_name
from regrow.checkpoint.format.tensor_source import segments
from regrow.checkpoint.load.read_plan import check_names, covered
from regrow.checkpoint.load.reader import read_tensors
from regrow.checkpoint.run.catalog import Catalog
from regrow.checkpoint.sources.dcp import DcpSource
from regrow.checkpoint.storage.base import Storage
from regrow.checkpoint.storage.opening import as_storage

__all__ = [
    "check_compatible",
    "is_incomplete",
    "is_verified",
    "load_tensors",
    "read_items",
    "resolve_foreign",
]

log = logging.getLogger(__name__)

Place = Storage | Path | str
# What a thread holds of a tensor on its way out of a foreign folder.
_PIECE_BYTES = 32 << 20
_THREADS = 4


def is_verified(place: Place) -> bool:
    """Whether a step has a manifest, so that what is read from it can be verified."""
    return as_storage(place).exists(MANIFEST)


def read_items(place: Place, manifest: Manifest) -> list[StoredChunk]:
    """What all ranks wrote into a step.

    Raises:
        DamagedStepError: a small file does not match its hash.
    """
    storage = as_storage(place)
    _check_hash(storage, METADATA, manifest)
    items = _items_of(storage, manifest, range(manifest.ranks))
    first: dict[str, StoredChunk] = {}
    for item in items:
        one = first.setdefault(item.name, item)
        if (one.global_shape, one.dtype) != (item.global_shape, item.dtype):
            raise DamagedStepError(
                f"the chunks of {item.name} in {storage.url} must be of one tensor, but differ in shape or dtype; "
                "use another step"
            )
    return items


def _items_of(storage: Storage, manifest: Manifest, ranks: Iterable[int]) -> list[StoredChunk]:
    return [item for rank in ranks for item in _items_of_rank(storage, manifest, rank)]


def _items_of_rank(storage: Storage, manifest: Manifest, rank: int) -> list[StoredChunk]:
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
) -> list[StoredChunk]:
    """The items that a load reads; under the layout that wrote them, a few ranks' manifests hold them all."""
    ranks = dist.get_world_size(group)
    if ranks == manifest.ranks and ranks > 1:
        writers = sorted({writer_of(name, tensor, range(ranks)) for name, tensor in tensors.items()})
        items = _items_of(storage, manifest, writers)
        by_name: dict[str, list[StoredChunk]] = defaultdict(list)
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
        group: of all ranks, on the CPU.
        known: every name that the model has, on whichever rank; a weight of another name is then an error.

    Returns:
        The bytes that this rank read.

    Raises:
        CheckpointError: a name is missing there, or is not known, or has another shape or dtype, or no memory here.
        DamagedStepError: a byte is not what was written.
    """
    storage = as_storage(place)
    _check_memory(tensors)
    if is_verified(storage):
        first = dist.get_rank(group) == 0
        manifest = read_manifest(storage, check_files=first)
        if first:
            _check_hash(storage, METADATA, manifest)
        items = _needed_items(storage, manifest, tensors, group)
        if known is not None:
            _check_known(storage.url, items, known)
        return read_tensors(storage, items, tensors)
    with DcpSource(storage) as source:
        _check_against(source, tensors)
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="read") as pool:
            return sum(pool.map(lambda pair: _read_foreign(source, *pair), tensors.items()))


def _check_memory(tensors: Mapping[str, Tensor]) -> None:
    """Whether there is something to load into: copying into a tensor on the meta device does nothing."""
    name = next((n for n, t in tensors.items() if t.is_meta or local_tensor(t).is_meta), None)
    if name is not None:
        raise CheckpointError(
            f"{name} must have memory to be loaded into, but is on the meta device; give the model memory first, for "
            "instance by to_empty(device=...)"
        )


@torch.no_grad()
def _read_foreign(source: DcpSource, name: str, tensor: Tensor) -> int:
    """Fills this rank's part of one tensor; returns its bytes."""
    chunk, local = chunk_of(name, tensor), local_tensor(tensor)
    if not local.numel():
        return 0
    box = tuple((o, o + n) for o, n in zip(chunk.offset, chunk.shape, strict=True))
    for piece in segments(box, local.element_size(), _PIECE_BYTES):
        target = local
        for dim, ((start, stop), (origin, _)) in enumerate(zip(piece, box, strict=True)):
            target = target.narrow(dim, start - origin, stop - start)
        target.copy_(source.read(name, piece))
    return local.numel() * local.element_size()


def _check_known(url: str, items: Iterable[StoredChunk], known: Collection[str]) -> None:
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
        with DcpSource(storage) as source:
            _check_against(source, tensors)


def _check_against(source: DcpSource, tensors: Mapping[str, Tensor]) -> None:
    for name in tensors:
        if name in source.objects:
            raise CheckpointError(f"{name} in {source.place} must be a tensor, but is not; give another checkpoint")
    missing = [name for name in tensors if name not in source.infos]
    if missing:
        raise CheckpointError(
            f"{source.place} must hold {missing[0]}, but does not ({len(missing)} of {len(tensors)} names are "
            "missing); use the model it was saved from, or exclude that part with checkpoint.exclude_from_loading"
        )
    for name, tensor in tensors.items():
        info = source.infos[name]
        if info.shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{name} in {source.place} has shape {info.shape}, but the model's has {tuple(tensor.shape)}; "
                "use the model's dimensions that it was saved with"
            )
        if info.dtype != tensor.dtype:
            raise CheckpointError(
                f"{name} in {source.place} is {info.dtype}, but the model's is {tensor.dtype}; "
                "convert the checkpoint first"
            )


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
        f"{METADATA}; check the path"
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
