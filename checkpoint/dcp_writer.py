"""The file image as a writer for stock DCP: `dcp.save(state, storage_writer=ImageWriter(path))`.

For code that drives DCP itself. The result has stock layout and our manifests, so that it is verified when loaded.
Our own saves don't come here: they plan without collectives.
"""

import dataclasses
import pickle
import uuid
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint import SavePlan as DcpPlan
from torch.distributed.checkpoint import SavePlanner, StorageWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from checkpoint.commit import complete_step
from checkpoint.contents import rank_manifest, rank_manifest_name
from checkpoint.errors import CheckpointError
from checkpoint.exchange import report_of
from checkpoint.manifest import Manifest
from checkpoint.plan import Chunk, place_chunks
from checkpoint.storage.base import Storage
from checkpoint.storage.opening import as_storage
from checkpoint.writer import file_name, write_tensors

__all__ = ["ImageWriter"]


@dataclasses.dataclass(frozen=True, slots=True)
class _Prefix:
    """What the global plan tells each rank: its number."""

    rank: int


class ImageWriter(StorageWriter):
    """Writes a DCP checkpoint of tensors, hashed, durable, and complete or not there.

    Objects that are not tensors are refused: they would have to be pickled.

    Args:
        place: the step's folder, which must not be there yet.
        manifest: what to say of it beside the tensors.
    """

    def __init__(self, place: Storage | Path | str, manifest: Manifest | None = None) -> None:
        self._final = as_storage(place)
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
        for item in plan.items:
            if item.type is WriteItemType.BYTE_IO:
                raise CheckpointError(
                    f"{item.index.fqn} must be a tensor to be saved, but is another object; keep it in the manifest"
                )
        self._place.make()
        return plan

    def prepare_global_plan(self, plans: list[DcpPlan]) -> list[DcpPlan]:
        return [dataclasses.replace(plan, storage_data=_Prefix(rank)) for rank, plan in enumerate(plans)]

    def write_data(self, plan: DcpPlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        self._rank = plan.storage_data.rank
        tensors: dict[str, Tensor] = {}
        chunks, indices = [], []
        for number, item in enumerate(plan.items):
            value = planner.resolve_data(item)
            assert isinstance(value, Tensor)
            # One tensor may have several chunks on a rank; a number tells them apart while they are written.
            key = f"{number}"
            tensors[key] = value.detach()
            chunks.append(dataclasses.replace(_chunk_of(item, value), name=key))
            indices.append(item.index)
        layout = place_chunks(chunks)
        names = [file_name(self._rank, n) for n in range(len(layout.file_bytes))]
        hashes = write_tensors(self._place, names, layout, tensors)
        named = tuple(
            dataclasses.replace(placed, chunk=dataclasses.replace(placed.chunk, name=item.index.fqn))
            for placed, item in zip(layout.items, plan.items, strict=True)
        )
        blocks = [hashes[placed.chunk.name] for placed in layout.items]
        body = rank_manifest(dataclasses.replace(layout, items=named), names, blocks)
        self._place.write(rank_manifest_name(self._rank), body)
        done: Future[list[WriteResult]] = Future()
        done.set_result(
            [
                WriteResult(
                    index=index,
                    size_in_bytes=item.size,
                    storage_data=_StorageInfo(names[item.file], item.start, item.size),
                )
                for index, item in zip(indices, layout.items, strict=True)
            ]
        )
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        metadata.storage_data = {r.index: r.storage_data for rank in results for r in rank}
        metadata.storage_meta = self.storage_meta()
        reports = [report_of(self._place.read(rank_manifest_name(rank))) for rank in range(len(results))]
        complete_step(self._place, self._manifest, reports, pickle.dumps(metadata))


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
