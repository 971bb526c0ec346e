"""Saves steps: snapshot into the file image, write behind training, commit by rename.

Nothing here uses the training's process group, and nothing but the snapshot happens on the training thread.
"""

import dataclasses
import json
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, final

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from checkpoint.catalog import step_folder_name
from checkpoint.config import AsyncMode
from checkpoint.contents import metadata_of, rank_items, stored_items, write_metadata
from checkpoint.errors import CheckpointError
from checkpoint.files import fsync_folder, fsync_path
from checkpoint.image import FileImage
from checkpoint.manifest import Manifest, write_manifest
from checkpoint.plan import make_plan
from checkpoint.writer import takes_direct_io, write_image

__all__ = ["SaveResult", "StepSaver"]

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SaveResult:
    """How a save ended.

    Attributes:
        step: which.
        path: the committed folder, None where it failed.
        error: why it failed.
        seconds: from the call to the commit.
    """

    step: int
    path: Path | None
    error: str | None
    seconds: float


@final
class StepSaver:
    """One per run; every rank calls its methods in the same order. At most one save is in flight.

    Args:
        folder: the checkpoint folder.
        mode: `disabled` returns when durable, `async` when copied, `async_with_pinned_mem` at once.
        device: where the tensors live.
        group: a gloo group of this saver's own; its background thread uses it.
    """

    def __init__(self, folder: Path, mode: AsyncMode, device: torch.device, group: dist.ProcessGroup) -> None:
        self._folder, self._mode, self._device, self._group = folder, mode, device, group
        self._rank, self._ranks = dist.get_rank(group), dist.get_world_size(group)
        token = [uuid.uuid4().hex[:8]]
        dist.broadcast_object_list(token, group=group, group_src=0)
        self._token = str(token[0])
        self._image: FileImage | None = None
        self._direct: bool | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="hash")
        self._running: Future[SaveResult] | None = None
        self._staged = threading.Event()
        self._staged.set()
        self._stage_error: Exception | None = None
        # The event after a GPU's copies; the background thread has its own reference, since this one is dropped
        # as soon as the training stream waits for it.
        self._copied: Any = None

    def begin(self, tensors: Mapping[str, Tensor], manifest: Manifest) -> list[SaveResult]:
        """Starts saving a step, after the save before it has ended.

        Args:
            tensors: by flat name; must not change before `wait_staged` returns.
            manifest: what to write, without `files` and `hashes`.

        Returns:
            The results that had not been asked for yet; with `disabled` this step's too.
        """
        started = time.perf_counter()
        finished = self.wait()
        image = self._image_for(tensors)
        self._staged.clear()
        self._stage_error = None
        if self._device.type == "cuda":
            self._copied = self._queue_copies(image, tensors)
        elif self._mode is not AsyncMode.async_with_pinned_mem:
            image.copy_from(tensors)
            self._staged.set()
        held = dict(tensors)
        self._running = self._thread.submit(self._save, image, held, self._copied, manifest, started)
        if self._mode is AsyncMode.disabled:
            finished += self.wait()
        elif self._mode.value == "async":
            self.wait_staged()
        return finished

    def wait_staged(self) -> None:
        """Returns when the tensors may change; on a GPU the stream waits, not the host."""
        if self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)
            self._copied = None
            return
        self._staged.wait()
        if self._stage_error is not None:
            raise CheckpointError(f"copying the state failed: {self._stage_error}") from self._stage_error

    def poll(self) -> list[SaveResult]:
        """The result of a save that has ended since the last question; does not wait."""
        return self.wait() if self._running is not None and self._running.done() else []

    def wait(self) -> list[SaveResult]:
        """The result of the save in flight, if there is one; waits for it."""
        running, self._running = self._running, None
        return [running.result()] if running is not None else []

    def close(self) -> None:
        """Ends the threads; a save in flight ends first."""
        self._thread.shutdown()
        self._pool.shutdown()

    def _image_for(self, tensors: Mapping[str, Tensor]) -> FileImage:
        """The warm image, made anew only when the layout changed."""
        plan = make_plan(tensors, self._rank, self._ranks)
        if self._image is None or self._image.plan.key != plan.key:
            self._image = FileImage(plan, pinned=self._device.type == "cuda")
        return self._image

    def _queue_copies(self, image: FileImage, tensors: Mapping[str, Tensor]) -> Any:
        """Copies on a side stream, after what is queued already; returns the event at their end."""
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            image.copy_from(tensors)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(stream)
        return copied

    def _save(
        self,
        image: FileImage,
        tensors: Mapping[str, Tensor],
        copied: Any,
        manifest: Manifest,
        started: float,
    ) -> SaveResult:
        """The background part: stage where that is left to do, write, commit."""
        problem = self._stage(image, tensors, copied)
        partial = self._folder / f"{step_folder_name(manifest.step)}.partial-{self._token}"
        report: dict[str, Any] = {}
        if problem is None:
            try:
                report = self._write_own(partial, image)
            except OSError as error:
                problem = f"{error.strerror or error} ({partial})"
        verdict = self._commit(partial, manifest, report, problem)
        path = None if verdict else self._folder / step_folder_name(manifest.step)
        return SaveResult(step=manifest.step, path=path, error=verdict, seconds=time.perf_counter() - started)

    def _stage(self, image: FileImage, tensors: Mapping[str, Tensor], copied: Any) -> str | None:
        """Completes the snapshot; returns what went wrong."""
        try:
            if copied is not None:
                copied.synchronize()
            elif not self._staged.is_set():
                image.copy_from(tensors)
        except Exception as error:
            self._stage_error = error
            return f"copying the state failed: {error}"
        finally:
            self._staged.set()
        return None

    def _write_own(self, partial: Path, image: FileImage) -> dict[str, Any]:
        """This rank's file and manifest, durable; returns what the root manifest says of them."""
        partial.mkdir(parents=True, exist_ok=True)
        if self._direct is None:
            self._direct = takes_direct_io(partial)
            log.info("checkpoints are written %s the page cache", "past" if self._direct else "through")
        file = f"__{self._rank}_0.distcp"
        hashes: dict[str, list[str]] = {}
        sizes: dict[str, int] = {}
        if image.plan.items:
            hashes = write_image(partial / file, image, direct=self._direct, pool=self._pool)
            sizes[file] = image.size
        name = f"rank-{self._rank}.json"
        body = json.dumps(rank_items(image.plan, file, hashes)).encode()
        with (partial / name).open("wb") as out:
            out.write(body)
            out.flush()
            os.fsync(out.fileno())
        sizes[name] = len(body)
        return {"files": sizes, "hashes": {name: xxhash.xxh3_128_hexdigest(body)}}

    def _commit(self, partial: Path, manifest: Manifest, report: dict[str, Any], error: str | None) -> str | None:
        """Rank 0 makes the step valid when every rank has reported; returns the error that all ranks see."""
        reports: list[Any] | None = [None] * self._ranks if self._rank == 0 else None
        verdict: list[str | None] = [None]
        try:
            dist.gather_object((report, error), reports, group=self._group, group_dst=0)
            if reports is not None:
                verdict[0] = self._make_valid(partial, manifest, reports)
            dist.broadcast_object_list(verdict, group=self._group, group_src=0)
        except RuntimeError as failure:
            return f"another rank is gone ({failure})"
        return verdict[0]

    def _make_valid(self, partial: Path, manifest: Manifest, reports: list[Any]) -> str | None:
        errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(reports) if error is not None]
        try:
            if not errors:
                self._rename(partial, manifest, [report for report, _ in reports])
                return None
        except OSError as failure:
            errors.append(f"rank 0: {failure.strerror or failure} ({partial})")
        shutil.rmtree(partial, ignore_errors=True)
        return "; ".join(errors)

    def _rename(self, partial: Path, manifest: Manifest, reports: list[dict[str, Any]]) -> None:
        files = {name: size for report in reports for name, size in report["files"].items()}
        hashes = {name: value for report in reports for name, value in report["hashes"].items()}
        items = [i for name in hashes for i in stored_items(json.loads((partial / name).read_bytes()))]
        write_metadata(partial / ".metadata", metadata_of(items))
        fsync_path(partial / ".metadata")
        metadata = (partial / ".metadata").read_bytes()
        files[".metadata"], hashes[".metadata"] = len(metadata), xxhash.xxh3_128_hexdigest(metadata)
        write_manifest(partial, dataclasses.replace(manifest, files=files, hashes=hashes))
        fsync_folder(partial)
        partial.rename(self._folder / step_folder_name(manifest.step))
        fsync_folder(self._folder)
