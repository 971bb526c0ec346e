"""The file image as a writer for stock DCP: `dcp.save(state, storage_writer=ImageWriter(path))`.

For code that drives DCP itself; `regrow.checkpoint.load.dcp_reader` is its other half. The result has stock layout
and our manifests, so that it is verified when loaded. Our own saves don't come here: they plan without collectives.
"""

import dataclasses
import io
import pickle
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint import SavePlan as DcpPlan
from torch.distributed.checkpoint import SavePlanner, StorageWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from regrow.checkpoint.errors import CheckpointError
from regrow.checkpoint.format.layout import Chunk, place_chunks
from regrow.checkpoint.format.manifest import Manifest
from regrow.checkpoint.format.objects import StoredObject, objects_file_name, place_objects, with_objects
from regrow.checkpoint.format.rank_manifest import rank_manifest, rank_manifest_name
from regrow.checkpoint.save.commit import complete_step
from regrow.checkpoint.save.coordinator import report_of
from regrow.checkpoint.save.writer import file_name, write_tensors
from regrow.checkpoint.storage.base import Storage
from regrow.checkpoint.storage.opening import as_storage
from regrow.torch_compat import StorageInfo

__all__ = ["ImageWriter"]


@dataclasses.dataclass(frozen=True, slots=True)
class _Prefix:
    """What the global plan tells each rank: its number."""

    rank: int


class ImageWriter(StorageWriter):
    """Writes a DCP checkpoint, hashed, durable, and complete or not there.

    Objects that are not tensors are stored as JSON (and for stock readers); those that JSON cannot hold are refused.

    Args:
        location: the step's folder, which must not be there yet.
        manifest: what to say of it beside the tensors.
    """

    def __init__(self, location: Storage | Path | str, manifest: Manifest | None = None) -> None:
        self._final = as_storage(location)
        self._manifest = manifest or Manifest(step=0, lineage="")
        self._rank = 0
        self._place = self._final

    def reset(self, checkpoint_id: Any = None) -> None:
        if checkpoint_id is not None:
            self._final = self._place = as_storage(checkpoint_id)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return isinstance(checkpoint_id, str | Path)

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(checkpoint_id=self._final.url, save_id=uuid.uuid4().hex)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if is_coordinator and self._final.names():
            raise CheckpointError(f"{self._final.url} must not be there yet, but is; choose another folder")

    def prepare_local_plan(self, plan: DcpPlan) -> DcpPlan:
        self._place.make()
        return plan

    def prepare_global_plan(self, plans: list[DcpPlan]) -> list[DcpPlan]:
        return [dataclasses.replace(plan, storage_data=_Prefix(rank)) for rank, plan in enumerate(plans)]

    def write_data(self, plan: DcpPlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        self._rank = plan.storage_data.rank
        # First, since they can be refused.
        objects = self._write_objects([i for i in plan.items if i.type is WriteItemType.BYTE_IO], planner)
        items = [item for item in plan.items if item.type is not WriteItemType.BYTE_IO]
        body, results = self._write_tensors(items, planner)
        self._place.write(rank_manifest_name(self._rank), with_objects(body, [stored for stored, _ in objects]))
        done: Future[list[WriteResult]] = Future()
        done.set_result([*results, *(result for _, result in objects)])
        return done

    def _write_objects(
        self, items: Sequence[WriteItem], planner: SavePlanner
    ) -> list[tuple[StoredObject, WriteResult]]:
        bodies: dict[str, bytes] = {}
        for item in items:
            value = planner.resolve_data(item)
            assert isinstance(value, io.BytesIO)
            bodies[item.index.fqn] = value.getvalue()
        file = objects_file_name(self._rank)
        placed = place_objects(file, bodies)
        if placed:
            self._place.write(file, b"".join(bodies.values()))
        return [(o, _result(item.index, file, o.start, o.size)) for item, o in zip(items, placed, strict=True)]

    def _write_tensors(self, items: Sequence[WriteItem], planner: SavePlanner) -> tuple[bytes, list[WriteResult]]:
        """Writes the files; returns the rank's manifest."""
        tensors: dict[str, Tensor] = {}
        chunks = []
        for number, item in enumerate(items):
            value = planner.resolve_data(item)
            assert isinstance(value, Tensor)
            # One tensor may have several chunks on a rank; a number tells them apart while they are written.
            key = f"{number}"
            tensors[key] = value.detach()
            chunks.append(dataclasses.replace(_chunk_of(item, value), name=key))
        layout = place_chunks(chunks)
        names = [file_name(self._rank, n) for n in range(len(layout.file_bytes))]
        hashes = write_tensors(self._place, names, layout, tensors)
        named = tuple(
            dataclasses.replace(placed, chunk=dataclasses.replace(placed.chunk, name=item.index.fqn))
            for placed, item in zip(layout.items, items, strict=True)
        )
        blocks = [hashes[placed.chunk.name] for placed in layout.items]
        body = rank_manifest(dataclasses.replace(layout, items=named), names, blocks)
        results = [
            _result(item.index, names[placed.file], placed.start, placed.size)
            for item, placed in zip(items, layout.items, strict=True)
        ]
        return body, results

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        metadata.storage_data = {r.index: r.storage_data for rank in results for r in rank}
        metadata.storage_meta = self.storage_meta()
        reports = [report_of(self._place.read(rank_manifest_name(rank))) for rank in range(len(results))]
        complete_step(self._place, self._manifest, reports, pickle.dumps(metadata))


def _result(index: MetadataIndex, file: str, start: int, size: int) -> WriteResult:
    return WriteResult(index=index, size_in_bytes=size, storage_data=StorageInfo(file, start, size))


def _chunk_of(item: WriteItem, value: Tensor) -> Chunk:
    """The box that DCP's planner wants written."""
    assert item.tensor_data is not None
    box = item.tensor_data.chunk
    return Chunk(
        name=item.index.fqn,
        dtype=value.dtype,
        global_shape=tuple(item.tensor_data.size),
        offset=tuple(box.offsets),
        shape=tuple(box.sizes),
    )
