"""Writing and reading a step's bytes through PyTorch Distributed Checkpoint (DCP).

A save goes into `step-N.partial-<token>`, every file and the folder are flushed, rank 0 writes the manifest,
renames and flushes the parent: the name `step-N` is only ever a complete checkpoint.
"""

import dataclasses
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from checkpoint.catalog import Catalog, step_folder_name
from checkpoint.errors import CheckpointError
from checkpoint.files import fsync_folder, fsync_path
from checkpoint.manifest import MANIFEST, Manifest, write_manifest

__all__ = ["load_tensors", "resolve_foreign", "save_step"]


def save_step(folder: Path, tensors: Mapping[str, Tensor], manifest: Manifest, group: dist.ProcessGroup) -> Path:
    """Saves one step and commits it; every rank of `group` calls this.

    Args:
        folder: the checkpoint folder.
        tensors: by flat name; DTensors hold this rank's shard of them.
        manifest: what to write, without `files`.
        group: a group apart from the training's, on the CPU.

    Returns:
        The committed folder, durable when this returns.

    Raises:
        CheckpointError: a rank could not write.
    """
    token = [uuid.uuid4().hex[:8]]
    dist.broadcast_object_list(token, group=group, group_src=0)
    partial = folder / f"{step_folder_name(manifest.step)}.partial-{token[0]}"
    final = folder / step_folder_name(manifest.step)
    writer = FileSystemWriter(partial, single_file_per_rank=True, sync_files=True)
    try:
        dcp.save(dict(tensors), storage_writer=writer, process_group=group)
    except CheckpointException as error:
        raise CheckpointError(f"saving {final} failed: {_causes(error)}") from error
    if dist.get_rank(group) == 0:
        # DCP flushes .metadata to the disk before its last buffer is written, so it is flushed again here.
        fsync_path(partial / ".metadata")
        files = {p.name: p.stat().st_size for p in sorted(partial.iterdir()) if p.name != MANIFEST}
        write_manifest(partial, dataclasses.replace(manifest, files=files))
        fsync_folder(partial)
        partial.rename(final)
        fsync_folder(folder)
    dist.barrier(group=group)
    return final


def load_tensors(path: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup) -> None:
    """Reads a step into existing tensors, resharding to whatever layout they have.

    Raises:
        CheckpointError: a name is missing there, or has another shape or dtype.
    """
    reader = FileSystemReader(path)
    try:
        stored = reader.read_metadata().state_dict_metadata
    except (OSError, EOFError) as error:
        raise CheckpointError(f"{path} is not a checkpoint ({error}); give a folder with .metadata") from error
    _check_against(path, stored, tensors)
    try:
        dcp.load(dict(tensors), storage_reader=FileSystemReader(path), process_group=group)
    except CheckpointException as error:
        raise CheckpointError(f"loading {path} failed: {_causes(error)}") from error


def _check_against(path: Path, stored: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    missing = [name for name in tensors if name not in stored]
    if missing:
        raise CheckpointError(
            f"{path} must hold {missing[0]}, but does not ({len(missing)} of {len(tensors)} names are missing); "
            "use the model it was saved from, or exclude that part with checkpoint.exclude_from_loading"
        )
    for name, tensor in tensors.items():
        entry = stored[name]
        assert isinstance(entry, TensorStorageMetadata), name
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
