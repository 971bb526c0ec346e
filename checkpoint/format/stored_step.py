"""A complete step, opened once: what was read of it travels on as an object."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, final

import xxhash

from regrow.checkpoint.documents import DocumentError
from regrow.checkpoint.errors import DamagedStepError
from regrow.checkpoint.format.later_metrics import read_later_metrics
from regrow.checkpoint.format.manifest import MANIFEST, Manifest, read_manifest
from regrow.checkpoint.format.objects import StoredObject, parse_objects, read_object
from regrow.checkpoint.format.rank_manifest import StoredChunk, parse_rank_manifest, rank_manifest_name
from regrow.checkpoint.format.step_name import METADATA
from regrow.checkpoint.format.tensor_source import TensorInfo
from regrow.checkpoint.storage.base import Storage
from regrow.checkpoint.storage.opening import as_storage

__all__ = ["StoredStep", "chunks_by_name", "infos_of", "is_verified"]


def is_verified(location: Storage | Path | str) -> bool:
    """Whether a folder has a manifest, so that what is read from it can be verified."""
    return as_storage(location).exists(MANIFEST)


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class StoredStep:
    """A committed step: its manifest was read and checked when it was opened, and is not read again.

    Attributes:
        storage: its folder.
        manifest: what it says of itself.
    """

    storage: Storage
    manifest: Manifest
    # The ranks' chunks, read when they are asked for.
    _chunks: dict[int, list[StoredChunk]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, location: Storage | Path | str, *, check_files: bool = True) -> Self:
        """Reads a step's manifest.

        Args:
            location: the step's folder.
            check_files: look at the presence and size of its files; where many ranks open a step, one of them does.

        Raises:
            FileNotFoundError: there is no manifest: not a checkpoint of ours, or not a complete one.
            DamagedStepError: the manifest or a file is not what was written.
            OtherFormatError: another version wrote it.
            OSError: it cannot be read.
        """
        storage = as_storage(location)
        return cls(storage=storage, manifest=read_manifest(storage, check_files=check_files))

    @classmethod
    def find(cls, location: Storage | Path | str, *, check_files: bool = True) -> Self | None:
        """As `open`; None where there is no manifest, as in a folder that another program wrote."""
        storage = as_storage(location)
        return cls.open(storage, check_files=check_files) if is_verified(storage) else None

    @property
    def url(self) -> str:
        """Where it lies, for messages."""
        return self.storage.url

    @property
    def step(self) -> int:
        """The optimizer step whose end it is."""
        return self.manifest.step

    @property
    def kind(self) -> str:
        """`full`, or `model` for weights alone."""
        return self.manifest.kind

    @property
    def train_state(self) -> Mapping[str, Any]:
        """Step, samples consumed and the like, as plain JSON."""
        return self.manifest.train_state

    def metrics(self) -> dict[str, float]:
        """What was measured at it, before it was committed or later."""
        return {**self.manifest.metrics, **read_later_metrics(self.storage)}

    @property
    def resumable(self) -> bool:
        """Whether training can continue from it: a full state, or the first weights (a seed checkpoint)."""
        return self.kind == "full" or self.step == 0

    def items(self) -> list[StoredChunk]:
        """All chunks; what stock readers go by (`.metadata`) is checked with them.

        Raises:
            DamagedStepError: a small file is not what was written.
        """
        self.check_metadata()
        return self.items_of(range(self.manifest.ranks))

    def items_of(self, ranks: Iterable[int]) -> list[StoredChunk]:
        """The chunks that these ranks wrote.

        Raises:
            DamagedStepError: a rank's manifest is not what was written.
        """
        return [item for rank in ranks for item in self._items_of_rank(rank)]

    def objects(self) -> dict[str, StoredObject]:
        """What was saved beside tensors, by flat name.

        Raises:
            DamagedStepError: a rank's manifest is not what was written.
        """
        found: dict[str, StoredObject] = {}
        for rank in range(self.manifest.ranks):
            name = rank_manifest_name(rank, self.manifest.writer)
            try:
                found |= parse_objects(self._read_hashed(name))
            except DocumentError as error:
                raise self._damaged(name, error) from error
        return found

    def read_object(self, stored: StoredObject) -> Any:
        """An object as it was saved, tuples included.

        Raises:
            DamagedStepError: its stream says something else than the manifest.
        """
        return read_object(self.storage, stored)

    def check_metadata(self) -> None:
        """Whether `.metadata`, which stock readers go by, is what was written.

        Raises:
            DamagedStepError: it is not.
        """
        self._read_hashed(METADATA)

    def _items_of_rank(self, rank: int) -> list[StoredChunk]:
        if rank not in self._chunks:
            self._chunks[rank] = self._read_items(rank_manifest_name(rank, self.manifest.writer))
        return self._chunks[rank]

    def _read_items(self, name: str) -> list[StoredChunk]:
        try:
            items = parse_rank_manifest(self._read_hashed(name))
        except DocumentError as error:
            raise self._damaged(name, error) from error
        strange = next((item.file for item in items if item.file not in self.manifest.files), None)
        if strange is not None:
            raise DamagedStepError(
                f"{self.url}/{name} names {strange}, which the step does not have; use another step"
            )
        return items

    def _read_hashed(self, name: str) -> bytes:
        expected = self.manifest.hashes.get(name)
        # A file of another size than the manifest's is never read.
        body = self.storage.read(name, self.manifest.files.get(name, 0)) if expected else b""
        if expected is None or xxhash.xxh3_128_hexdigest(body) != expected:
            raise DamagedStepError(f"{self.url}/{name} does not match its hash; the step is damaged, use another one")
        return body

    def _damaged(self, name: str, error: DocumentError) -> DamagedStepError:
        return DamagedStepError(f"{self.url}/{name} is damaged ({error}); use another step")


def chunks_by_name(url: str, items: Iterable[StoredChunk]) -> dict[str, list[StoredChunk]]:
    """The stored chunks of each tensor.

    Args:
        url: the step, for messages.
        items: what is stored.

    Raises:
        DamagedStepError: a tensor's chunks differ in shape or dtype.
    """
    found: dict[str, list[StoredChunk]] = defaultdict(list)
    for item in items:
        chunks = found[item.name]
        if chunks and (chunks[0].global_shape, chunks[0].dtype) != (item.global_shape, item.dtype):
            raise DamagedStepError(
                f"the chunks of {item.name} in {url} must be of one tensor, but differ in shape or dtype; the step "
                "is damaged, use another one"
            )
        chunks.append(item)
    return dict(found)


def infos_of(chunks: Mapping[str, Sequence[StoredChunk]]) -> dict[str, TensorInfo]:
    """Element type and shape of the tensors that stored chunks make up."""
    return {
        name: TensorInfo(dtype=items[0].torch_dtype, shape=items[0].global_shape) for name, items in chunks.items()
    }
