"""Where every tensor of a converted checkpoint will lie, known before the first byte is written.

A plan is made from names, types and shapes alone. It says which files there will be, what is constant in them, and
where each tensor's raw bytes go, so that a converter can write them in any order, from several threads, and again
after a kill.
"""

import dataclasses
import io
import json
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from regrow.checkpoint.errors import CheckpointError
from regrow.checkpoint.files import fsync_path
from regrow.checkpoint.format.layout import Chunk, SavePlan, place_chunks
from regrow.checkpoint.format.manifest import Manifest
from regrow.checkpoint.format.rank_manifest import metadata_of, parse_rank_manifest, rank_manifest, rank_manifest_name
from regrow.checkpoint.format.tensor_source import TensorInfo
from regrow.checkpoint.format.torch_archive import frame_of
from regrow.checkpoint.load.open_source import TorchFileSource
from regrow.checkpoint.save.commit import complete_step
from regrow.checkpoint.save.coordinator import report_of
from regrow.checkpoint.save.writer import file_name
from regrow.checkpoint.sources.safetensors import INDEX, SINGLE, header_bytes
from regrow.checkpoint.storage.local import LocalStorage
from regrow.errors import ConfigError
from regrow.torch_compat import FakeTensorMode, StorageInfo

__all__ = ["OutputPlan", "TensorPlacement", "plan_safetensors", "plan_step", "plan_torch", "size_in_bytes"]

_STEP_FILE_BYTES = 4 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorPlacement:
    """A tensor's place in the output."""

    name: str
    info: TensorInfo
    file: str
    start: int


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputPlan:
    """What to write.

    Attributes:
        files: sizes in bytes of the files that hold tensors.
        fixed: (file, position, bytes) around the tensors.
        placed: the tensors, in the order of the files.
        finish: writes the small files, given the folder and each tensor's block hashes.
        single: the one file of `files` is the whole output, not a folder.
    """

    files: Mapping[str, int]
    fixed: Sequence[tuple[str, int, bytes]]
    placed: Sequence[TensorPlacement]
    finish: Callable[[Path, Mapping[str, str]], None]
    single: bool = False
    prepared: Mapping[str, Callable[[Path], None]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Of all files that hold tensors."""
        return sum(self.files.values())


def size_in_bytes(text: str, field: str) -> int:
    """`5GB`, `500MB`, `2GiB` or a plain number as bytes; raises ConfigError naming the field."""
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if found is None or found[2].upper() not in units or float(found[1]) <= 0:
        raise ConfigError(f"{field} must be a size like 5GB or 500MB, but is {text!r}; use 5GB")
    return max(1, int(float(found[1]) * units[found[2].upper()]))


def plan_safetensors(
    infos: Mapping[str, TensorInfo], *, max_shard_bytes: int | None, small: Mapping[str, bytes]
) -> OutputPlan:
    """Safetensors, in shards with an index, or one file alone.

    Args:
        infos: the tensors; the shards hold them in this order.
        max_shard_bytes: of tensors in a shard (one tensor may be more); None: one file and nothing else.
        small: other files of the folder, by name.
    """
    groups: list[dict[str, TensorInfo]] = [{}]
    filled = 0
    for name, info in infos.items():
        if max_shard_bytes is not None and groups[-1] and filled + info.nbytes > max_shard_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = info
        filled += info.nbytes
    files: dict[str, int] = {}
    fixed, placed = [], []
    for number, group in enumerate(groups, start=1):
        file = SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        head = header_bytes(group, {"format": "pt"})
        position = len(head)
        fixed.append((file, 0, head))
        for name, info in group.items():
            placed.append(TensorPlacement(name=name, info=info, file=file, start=position))
            position += info.nbytes
        files[file] = position

    def finish(folder: Path, _hashes: Mapping[str, str]) -> None:
        if max_shard_bytes is None:
            return
        index = {
            "metadata": {"total_size": sum(i.nbytes for i in infos.values())},
            "weight_map": {p.name: p.file for p in placed},
        }
        _write(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())
        for name, body in small.items():
            _write(folder / name, body)

    return OutputPlan(files=files, fixed=fixed, placed=placed, finish=finish, single=max_shard_bytes is None)


def plan_torch(infos: Mapping[str, TensorInfo], work: Path) -> OutputPlan:
    """One `torch.save` file. torch itself writes its skeleton, into `work`, with holes for the data."""
    file = "model.pt"
    # torch puts the file's name into the archive; a skeleton beside it keeps what was written before a kill.
    skeleton = work / "skeleton" / file
    skeleton.parent.mkdir(exist_ok=True)
    with FakeTensorMode():
        tensors = {n: torch.empty(i.shape, dtype=i.dtype) for n, i in infos.items()}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(tensors, skeleton)
    with TorchFileSource(skeleton) as source:
        starts = {name: source.start_of(name) for name in infos}
    size = skeleton.stat().st_size
    placed = [TensorPlacement(name=n, info=i, file=file, start=starts[n]) for n, i in infos.items()]
    fixed, position = [], 0
    with skeleton.open("rb") as body:
        for item in [*placed, None]:
            end = size if item is None else item.start
            body.seek(position)
            fixed.append((file, position, body.read(end - position)))
            position = end if item is None else item.start + item.info.nbytes
    skeleton.unlink()
    skeleton.parent.rmdir()
    return OutputPlan(
        files={file: size}, fixed=fixed, placed=placed, finish=lambda _folder, _hashes: None, single=True
    )


def plan_step(
    infos: Mapping[str, TensorInfo],
    manifest: Manifest,
    *,
    file_bytes: int = _STEP_FILE_BYTES,
    objects: Mapping[str, Any] | None = None,
) -> OutputPlan:
    """One of our own steps, in files of about `file_bytes` as if so many ranks had written it.

    Args:
        infos: the tensors.
        manifest: what to say of them.
        file_bytes: see above.
        objects: numbers and the like that readers of plain DCP find beside the tensors, by flat name.
    """
    groups: list[list[Chunk]] = [[]]
    filled = 0
    for name, info in infos.items():
        if 0 in info.shape:
            raise CheckpointError(f"{name} must have elements, but its shape is {info.shape}; remove it")
        if groups[-1] and filled + info.nbytes > file_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(
            Chunk(
                name=name, dtype=info.dtype, global_shape=info.shape, offset=(0,) * len(info.shape), shape=info.shape
            )
        )
        filled += info.nbytes
    plans = [place_chunks(chunks) for chunks in groups]
    files: dict[str, int] = {}
    fixed, placed = [], []
    for rank, plan in enumerate(plans):
        file = file_name(rank, 0)
        files[file] = plan.total_bytes
        for item in plan.items:
            frame = frame_of(item.chunk.dtype, item.chunk.shape)
            fixed.append((file, item.start, frame.head))
            fixed.append((file, item.data + item.data_bytes, frame.tail))
            placed.append(
                TensorPlacement(name=item.chunk.name, info=infos[item.chunk.name], file=file, start=item.data)
            )

    def finish(folder: Path, hashes: Mapping[str, str]) -> None:
        _finish_step(folder, hashes, plans, manifest, objects or {})

    return OutputPlan(files=files, fixed=fixed, placed=placed, finish=finish)


def _finish_step(
    folder: Path,
    hashes: Mapping[str, str],
    plans: Sequence[SavePlan],
    manifest: Manifest,
    objects: Mapping[str, Any],
) -> None:
    """The ranks' manifests, and what makes a step of them."""
    storage = LocalStorage(folder)
    reports, items = [], []
    for rank, plan in enumerate(plans):
        names = [file_name(rank, 0)][: len(plan.file_bytes)]
        body = rank_manifest(plan, names, [hashes[item.chunk.name] for item in plan.items])
        storage.write(rank_manifest_name(rank), body, flush=False)
        reports.append(report_of(body))
        items += parse_rank_manifest(body)
    metadata = None
    if objects:
        metadata, stored = _with_objects(metadata_of(items), objects)
        storage.write(_OBJECTS, stored, flush=False)
        reports[0]["files"][_OBJECTS] = len(stored)
    complete_step(storage, manifest, reports, metadata)


_OBJECTS = "__objects.distcp"


def _with_objects(metadata: Metadata, objects: Mapping[str, Any]) -> tuple[bytes, bytes]:
    """`.metadata` with objects as stock DCP describes them, and the file that holds them."""
    file = io.BytesIO()
    entries: dict[str, Any] = {}
    storage: dict[MetadataIndex, Any] = {}
    for name, value in objects.items():
        stream = io.BytesIO()
        torch.save(value, stream)
        body = stream.getvalue()
        entries[name] = BytesStorageMetadata()
        storage[MetadataIndex(name)] = StorageInfo(relative_path=_OBJECTS, offset=file.tell(), length=len(body))
        file.write(body)
    described = dataclasses.replace(
        metadata,
        state_dict_metadata={**metadata.state_dict_metadata, **entries},
        planner_data={**metadata.planner_data, **{name: (name,) for name in entries}},
        storage_data={**metadata.storage_data, **storage},
    )
    return pickle.dumps(described), file.getvalue()


def _write(path: Path, body: bytes) -> None:
    path.write_bytes(body)
    fsync_path(path)
