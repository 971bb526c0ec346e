"""What stock optimizers and modules keep beside tensors (`param_groups`, `_extra_state`).

What JSON can hold stands as JSON in the manifest of the rank that wrote it, whose hash the step's manifest has. The
stream that stock readers want lies in a file of the rank's own; read back, it must say the same as the JSON.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

from regrow.checkpoint.documents import Count, DocumentError, FileName, FlatName, read_document
from regrow.checkpoint.errors import CheckpointError, DamagedStepError
from regrow.checkpoint.format.torch_file import TorchArchive, plain_value
from regrow.checkpoint.storage.base import RangeReader, Storage

__all__ = ["MemoryFile", "StoredObject", "objects_file_name", "parse_objects", "place_objects",
           "read_object", "with_objects"]  # fmt: skip


@final
class MemoryFile(RangeReader):
    """Bytes as a file.

    Args:
        body: all of it.
    """

    def __init__(self, body: bytes | memoryview) -> None:
        self._body = memoryview(body)

    def read_into(self, offset: int, memory: memoryview) -> int:
        part = self._body[offset : offset + len(memory)]
        memory[: len(part)] = part
        return len(part)

    def read_into_all(self, offset: int, memories: Sequence[memoryview]) -> int:
        done = 0
        for memory in memories:
            done += self.read_into(offset + done, memory)
        return done


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredObject:
    """An object in a step.

    Attributes:
        name: flat.
        value: as JSON has it: tuples are lists.
        file: its stream's file.
        start: where the stream begins there.
        size: its bytes.
    """

    name: FlatName
    value: Any
    file: FileName
    start: Count
    size: Count


@dataclass(frozen=True, kw_only=True, slots=True)
class _RankDocument:
    """The part of a rank's manifest that is about objects; there is none where nothing but tensors was saved."""

    objects: tuple[StoredObject, ...] = ()


def objects_file_name(rank: int) -> str:
    """The file that holds a rank's objects for stock readers."""
    return f"__{rank}_objects.distcp"


def place_objects(file: str, streams: Mapping[str, bytes]) -> list[StoredObject]:
    """Where `torch.save` streams are placed one after another, and what they hold.

    Args:
        file: theirs.
        streams: by flat name.

    Raises:
        CheckpointError: one is not what JSON can hold.
    """
    placed = []
    position = 0
    for name, body in streams.items():
        placed.append(
            StoredObject(name=name, value=_json_value(name, body), file=file, start=position, size=len(body))
        )
        position += len(body)
    return placed


def _json_value(name: str, body: bytes) -> Any:
    try:
        value = plain_value(TorchArchive(MemoryFile(body), 0, len(body)).value)
        return _as_json(value)
    except DocumentError as error:
        raise CheckpointError(
            f"{name} must be a tensor, or made of numbers, text, lists, and mappings with text as keys, but is not "
            f"({error}); leave it out of what is saved, or save a part of it"
        ) from None


def _as_json(value: Any) -> Any:
    """The same value with lists for tuples."""
    if isinstance(value, float) and not math.isfinite(value):
        raise DocumentError(f"it holds {value}, which JSON cannot")
    if isinstance(value, list | tuple):
        return [_as_json(v) for v in value]
    return {k: _as_json(v) for k, v in value.items()} if isinstance(value, dict) else value


def with_objects(body: bytes, objects: Sequence[StoredObject]) -> bytes:
    """A rank's manifest, with its objects."""
    if not objects:
        return body
    document = json.loads(body)
    document["files"][objects[0].file] = objects[-1].start + objects[-1].size
    document["objects"] = [asdict(stored) for stored in objects]
    return json.dumps(document).encode()


def parse_objects(body: bytes) -> dict[str, StoredObject]:
    """The objects in a rank's manifest, by flat name.

    Raises:
        DocumentError: it is no such document.
    """
    return {stored.name: stored for stored in read_document(body, _RankDocument).objects}


def read_object(storage: Storage, stored: StoredObject) -> Any:
    """An object as it was saved, tuples included.

    Raises:
        DamagedStepError: its stream says something else than its JSON.
    """
    try:
        with storage.open(stored.file) as file:
            value = plain_value(TorchArchive(file, stored.start, stored.size).value)
        if _as_json(value) != stored.value:
            raise DocumentError("it is not what the manifest says")
    except DocumentError as error:
        raise DamagedStepError(
            f"{stored.name} in {storage.url}/{stored.file} cannot be read ({error}); the step is damaged, use "
            "another one"
        ) from error
    return value
