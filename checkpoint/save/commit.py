"""Making a step valid: rank 0's part of a save, after all ranks' files are durable."""

import dataclasses
import errno
import math
from collections.abc import Sequence
from typing import final

import xxhash

from regrow.checkpoint.errors import CheckpointError
from regrow.checkpoint.format.manifest import MANIFEST, Manifest, write_manifest
from regrow.checkpoint.format.rank_manifest import metadata_bytes, parse_rank_manifest, rank_manifest_name
from regrow.checkpoint.format.step_name import METADATA, step_folder_name
from regrow.checkpoint.run.lease import FencingToken, LeaseLostError, Standing
from regrow.checkpoint.save.coordinator import Report
from regrow.checkpoint.storage.base import Storage

__all__ = ["Committer", "assemble_metadata", "complete_step"]


def assemble_metadata(folder: Storage, ranks: int, writer: str = "") -> bytes:
    """DCP's description of a step, from the ranks' manifests: costs time in ranks × tensors.

    Raises:
        CheckpointError: a tensor is not whole: a bug in who writes what, found before the step becomes valid.
    """
    names = [rank_manifest_name(rank, writer) for rank in range(ranks)]
    items = [item for name in names for item in parse_rank_manifest(folder.read(name))]
    written: dict[str, int] = {}
    for item in items:
        written[item.name] = written.get(item.name, 0) + math.prod(item.shape)
    for item in items:
        if written[item.name] != math.prod(item.global_shape):
            raise CheckpointError(
                f"{item.name} must be written once and whole, but {written[item.name]} of "
                f"{math.prod(item.global_shape)} elements were; please report this"
            )
    return metadata_bytes(items)


def complete_step(
    folder: Storage, manifest: Manifest, reports: Sequence[Report], metadata: bytes | None = None
) -> None:
    """Writes what makes a folder of ranks' files a step; durable on return.

    Args:
        folder: the folder.
        manifest: without `ranks`, `files` and `hashes`.
        reports: the ranks'.
        metadata: what `assemble_metadata` gave, where that is known.
    """
    files: dict[str, int] = {}
    hashes: dict[str, str] = {}
    for rank, report in enumerate(reports):
        files |= report["files"]
        name = rank_manifest_name(rank, manifest.writer)
        files[name], hashes[name] = report["bytes"], report["hash"]
    if metadata is None:
        metadata = assemble_metadata(folder, len(reports), manifest.writer)
    _write_metadata(folder, metadata)
    files[METADATA], hashes[METADATA] = len(metadata), xxhash.xxh3_128_hexdigest(metadata)
    # Flushes the folder: all names in it are durable before the step's own is.
    write_manifest(folder, dataclasses.replace(manifest, ranks=len(reports), files=files, hashes=hashes))


def _write_metadata(folder: Storage, metadata: bytes) -> None:
    """Where a step is written under its final name, a request that is late must not replace another writer's."""
    if folder.renames:
        folder.write(METADATA, metadata, flush=False)
    elif not folder.create(METADATA, metadata) and folder.read(METADATA) != metadata:
        raise FileExistsError(errno.EEXIST, f"another writer's {METADATA} is in {folder.url}")


@final
class Committer:
    """Where a step is written, and how it becomes valid.

    Args:
        folder: the checkpoint folder.
        token: of this start of the run, the same on all ranks.
        ticket: proves that this attempt is the folder's one writer; None where no other process can write.

    Attributes:
        writer: see `Manifest`; of the attempt that `begin` began.
    """

    def __init__(self, folder: Storage, token: str, ticket: FencingToken | None) -> None:
        self._folder, self._first_token, self._token, self._ticket = folder, token, token, ticket
        self.writer = "" if folder.renames else token
        self._begun, self._newest = 0, -1
        # `.metadata` of the newest layout, which is the same for every step saved under it.
        self._metadata: tuple[tuple[str, ...], bytes] | None = None

    def begin(self, step: int) -> None:
        """Begins an attempt at a step, on all ranks alike.

        Another attempt at the same step goes elsewhere: a rank that is late may still be writing its part of the one
        before, which must not be taken for a part of this one.
        """
        self._begun += 1
        again = step <= self._newest
        self._newest = max(self._newest, step)
        self._token = (
            xxhash.xxh32_hexdigest(f"{self._first_token}-{self._begun}".encode()) if again else self._first_token
        )
        self.writer = "" if self._folder.renames else self._token

    def working_name(self, step: int) -> str:
        """The folder that a step is written into."""
        name = step_folder_name(step)
        return f"{name}.partial-{self._token}" if self._folder.renames else name

    def working_place(self, step: int) -> Storage:
        """The same as a storage."""
        return self._folder.child(self.working_name(step))

    def check_absent(self, step: int) -> None:
        """Raises OSError where the step is there already: without renames, saving it again would spoil it."""
        if not self._folder.renames and self.is_committed(step):
            raise FileExistsError(errno.EEXIST, f"{step_folder_name(step)} is complete already")

    def check_lease(self, *, must_be_seen: bool = False) -> None:
        """Raises LeaseLostError where another writer has taken the folder over.

        Args:
            must_be_seen: also where the lease is not there. On another host than the holder's it may not be seen yet.
        """
        if self._ticket is None:
            return
        standing = self._ticket.standing(self._folder)
        if standing is Standing.taken or (must_be_seen and standing is Standing.removed):
            raise LeaseLostError(self._ticket.loss(self._folder, standing))

    def commit(self, manifest: Manifest, reports: Sequence[Report]) -> None:
        """Makes the step valid.

        Raises:
            OSError: the storage fails.
            LeaseLostError: this writer may not any more.
        """
        folder = self.working_place(manifest.step)
        # It names the files, which bear the writer where folders cannot be renamed.
        plans = (self.writer, *(report["plan"] for report in reports))
        if self._metadata is None or self._metadata[0] != plans:
            self._metadata = (plans, assemble_metadata(folder, len(reports), self.writer))
        self.check_lease(must_be_seen=True)
        self.check_absent(manifest.step)
        complete_step(folder, dataclasses.replace(manifest, writer=self.writer), reports, self._metadata[1])
        if self._folder.renames:
            self.check_lease(must_be_seen=True)
            self._folder.move(self.working_name(manifest.step), step_folder_name(manifest.step))

    def is_committed(self, step: int) -> bool:
        """Whether this attempt's step has become valid, as far as the storage shows."""
        name = step_folder_name(step)
        if self._folder.renames:
            return self._folder.exists(name) and not self._folder.exists(self.working_name(step))
        return self._folder.exists(f"{name}/{MANIFEST}")

    def discard(self, step: int) -> None:
        """Removes what was written of a step that did not become valid."""
        if self._folder.renames:
            self._folder.remove(self.working_name(step))
            return
        folder = self.working_place(step)
        # Another writer may be at work there by now: only what bears this one's name goes.
        for name in folder.names() if not self.is_committed(step) else []:
            if self.writer in name:
                folder.remove(name)
