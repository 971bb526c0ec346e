"""Our steps, and other programs' DCP folders, for stock DCP: `dcp.load(state, storage_reader=ImageReader(path))`.

For code that drives DCP itself. Steps of ours are verified as they are read; nothing that lies in a folder is run.
"""

import io
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, final

import torch
from torch.distributed.checkpoint import LoadPlan, LoadPlanner, StorageReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.futures import Future

from regrow.checkpoint.format.objects import StoredObject
from regrow.checkpoint.format.stored_step import StoredStep
from regrow.checkpoint.format.tensor_source import TensorInfo
from regrow.checkpoint.load.open_source import StepSource
from regrow.checkpoint.sources.dcp import DcpSource
from regrow.checkpoint.storage.base import Storage
from regrow.checkpoint.storage.opening import as_storage

__all__ = ["ImageReader"]


@final
class ImageReader(StorageReader):
    """Reads a step or a DCP folder into a state of any layout.

    Args:
        location: the folder.

    Raises (from DCP's calls, as one rank's part of a `CheckpointException`):
        CheckpointError: what is asked for is not there, damaged, or something that only running it would show.
    """

    def __init__(self, location: Storage | Path | str) -> None:
        self._storage = as_storage(location)
        # Our step, once it was opened: DCP asks for metadata and data apart from each other.
        self._step: StoredStep | None = None

    def reset(self, checkpoint_id: Any = None) -> None:
        if checkpoint_id is not None:
            self._storage, self._step = as_storage(checkpoint_id), None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return isinstance(checkpoint_id, str | Path)

    def _open(self, opened: ExitStack) -> tuple[StepSource | DcpSource, Mapping[str, StoredObject]]:
        """The tensors; and the objects of a step of ours."""
        if self._step is None:
            self._step = StoredStep.find(self._storage)
        if self._step is None:
            return opened.enter_context(DcpSource(self._storage)), {}
        return opened.enter_context(StepSource(self._step)), self._step.objects()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with ExitStack() as opened:
            source, stored = self._open(opened)
            entries: dict[str, Any] = {name: _whole(info) for name, info in source.infos.items()}
            objects = source.objects if isinstance(source, DcpSource) else stored
            entries |= {name: BytesStorageMetadata() for name in objects}
        return Metadata(state_dict_metadata=entries, planner_data={name: (name,) for name in entries})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """What is to be read is known by name."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        with ExitStack() as opened:
            source, stored = self._open(opened)
            for item in plan.items:
                if item.type is not LoadItemType.BYTE_IO:
                    _read_tensor(source, item, planner)
                    continue
                name = item.storage_index.fqn
                if isinstance(source, DcpSource):
                    value = source.read_object(name)
                else:
                    value = source.step.read_object(stored[name])
                planner.load_bytes(item, _stream_of(value))
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _whole(info: TensorInfo) -> TensorStorageMetadata:
    """DCP's description of a tensor as one chunk: how it is split on the disk is known to the source."""
    chunk = ChunkStorageMetadata(offsets=torch.Size([0] * len(info.shape)), sizes=torch.Size(info.shape))
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=info.dtype), size=torch.Size(info.shape), chunks=[chunk]
    )


def _stream_of(value: Any) -> io.BytesIO:
    """What DCP's planner unpickles: made here, of plain values."""
    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    return stream


def _read_tensor(source: StepSource | DcpSource, item: ReadItem, planner: LoadPlanner) -> None:
    name = item.storage_index.fqn
    target = planner.resolve_tensor(item).detach()
    box = tuple((o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
    target.copy_(source.read(name, box))
    planner.commit_tensor(item, target)
