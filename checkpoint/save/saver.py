"""Saves steps: snapshot into the file image, write behind training, commit.

Nothing here uses the training's process group once it is set up, and nothing but the snapshot happens on the
training thread.
"""

import contextlib
import dataclasses
import errno
import logging
import os
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from regrow.checkpoint.config import AsyncMode
from regrow.checkpoint.format.hashing import Hashes
from regrow.checkpoint.format.layout import LayoutKey, SavePlan, layout_key, make_plan
from regrow.checkpoint.format.manifest import Manifest
from regrow.checkpoint.format.rank_manifest import rank_manifest, rank_manifest_name
from regrow.checkpoint.format.step_name import step_folder_name
from regrow.checkpoint.ranks import broadcast_value, rank_and_count
from regrow.checkpoint.run.lease import FencingToken, LeaseLostError
from regrow.checkpoint.save.commit import Committer
from regrow.checkpoint.save.coordinator import Report, SaveCoordinator, WorkingPlace, own_store, report_of
from regrow.checkpoint.save.progress import SaveProgress
from regrow.checkpoint.save.staging import StagingBuffer
from regrow.checkpoint.save.writer import file_name, write_image, write_tensors
from regrow.checkpoint.storage.base import Storage
from regrow.checkpoint.storage.opening import as_storage

__all__ = ["SaveResult", "SaverOptions", "StepSaver"]

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SaveResult:
    """How a save ended.

    Attributes:
        step: which.
        url: of the committed folder, None where it failed.
        error: why it failed.
        final: no later save can succeed either: another writer has taken over.
        seconds: from the call to the commit.
    """

    step: int
    url: str | None
    error: str | None
    seconds: float
    final: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SaverOptions:
    """How saves are made.

    Attributes:
        files_per_rank: a rank's share is written as so many files at once.
        commit_timeout_s: a step whose ranks have not all reported by then has failed.
        ticket: of the lease on the folder; None where no other process can write there.
        use_store: reports go through the ranks' store; else through files alone.
    """

    files_per_rank: int = 1
    commit_timeout_s: float = 600.0
    ticket: FencingToken | None = None
    use_store: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _SaveJob:
    """What the background thread is given.

    Attributes:
        plan: of this rank.
        image: the snapshot's memory; None where the tensors themselves are written.
        tensors: kept alive until they are copied or written.
        copied: the event after a GPU's copies.
        problem: why there is nothing to write.
    """

    plan: SavePlan
    image: StagingBuffer | None
    tensors: Mapping[str, Tensor]
    copied: Any
    problem: str | None


@final
class StepSaver:
    """One per run; every rank calls its methods in the same order. At most one save is in flight.

    Args:
        folder: the checkpoint folder.
        mode: `disabled` returns when durable, `async` when copied, `async_with_pinned_mem` at once.
        device: where the tensors live.
        group: of all ranks, on the CPU; used while this is constructed and not later. None for one process without
            torch.distributed.
        options: see `SaverOptions`.
        progress: is told how far the save in flight is.
    """

    def __init__(
        self,
        folder: Storage | Path | str,
        mode: AsyncMode,
        device: torch.device,
        group: dist.ProcessGroup | None,
        options: SaverOptions | None = None,
        progress: SaveProgress | None = None,
    ) -> None:
        self._folder, self._mode, self._device = as_storage(folder), mode, device
        self._options, self._progress = options or SaverOptions(), progress or SaveProgress()
        self._rank, self._ranks = rank_and_count(group)
        token = broadcast_value(uuid.uuid4().hex[:8], group)
        self._committer = Committer(self._folder, token, self._options.ticket)
        store = own_store() if self._options.use_store and group is not None else None
        timeout_s = self._options.commit_timeout_s
        self._coordinator = SaveCoordinator(self._rank, self._ranks, store, token, timeout_s)
        self._saves = 0
        self._planned: tuple[LayoutKey, SavePlan] | None = None
        self._image: StagingBuffer | None = None
        self._preparing: Future[StagingBuffer] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save", initializer=_lower_priority)
        # One thread: hashing then leaves the other cores to training, and is still faster than the disk.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="hash", initializer=_lower_priority)
        self._running: Future[SaveResult] | None = None
        self._staged = threading.Event()
        self._staged.set()
        # The event after a GPU's copies; the background thread has its own reference, since this one is dropped
        # as soon as the training stream waits for it.
        self._copied: Any = None

    @property
    def is_busy(self) -> bool:
        """Whether a save of this rank's is still being written."""
        return self._running is not None and not self._running.done()

    def prepare(self, tensors: Mapping[str, Tensor], owner_ranks: Mapping[str, Sequence[int]] | None = None) -> None:
        """Makes the snapshots' memory ahead, in the background: the first save then costs what the later ones do.

        Page-locking takes seconds for each 10 GiB. Where it fails, the first save tries again and tells why.

        Args:
            tensors: as `save` will get them; only their layout is looked at.
            owner_ranks: see `make_plan`.
        """
        if self._mode is not AsyncMode.disabled:
            self._preparing = self._thread.submit(self._image_for, self._plan_for(dict(tensors), owner_ranks))

    def save(
        self,
        tensors: Mapping[str, Tensor],
        manifest: Manifest,
        owner_ranks: Mapping[str, Sequence[int]] | None = None,
    ) -> list[SaveResult]:
        """Starts saving a step, after the save before it has ended.

        Args:
            tensors: by flat name; must not change before `wait_staged` returns.
            manifest: what to write, without `ranks`, `files` and `hashes`.
            owner_ranks: see `make_plan`.

        Returns:
            The results that had not been asked for yet; with `disabled` this step's too.
        """
        started = time.perf_counter()
        finished = self.wait()
        held = dict(tensors)
        plan = self._plan_for(held, owner_ranks)
        self._staged.clear()
        self._progress.begin(manifest.step, plan.total_bytes)
        image, problem = None, None
        try:
            image = self._snapshot(plan, held)
        except Exception as error:
            # No memory, say: this rank's part of the save has failed, which it reports like any other failure.
            problem = f"copying the state failed: {error}"
        self._saves += 1
        work = _SaveJob(plan=plan, image=image, tensors=held, copied=self._copied, problem=problem)
        self._running = self._thread.submit(self._save, work, manifest, started)
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

    def poll(self) -> list[SaveResult]:
        """The result of a save that has ended since the last question; does not wait."""
        return self.wait() if self._running is not None and self._running.done() else []

    def wait(self) -> list[SaveResult]:
        """The result of the save in flight, if there is one; waits for it."""
        running, self._running = self._running, None
        return [running.result()] if running is not None else []

    def hurry(self) -> None:
        """Has the save in flight end without ranks that may be gone: it is complete, or has failed, when this one is
        done with its part."""
        self._coordinator.hurry()

    def close(self, *, wait: bool = True) -> None:
        """Ends the threads; a save in flight ends first, and without `wait` in the background."""
        if wait:
            self._thread.shutdown()
            self._pool.shutdown()
            self._coordinator.leave()
            return
        # Now and not when all is done, because this process may end at any moment.
        self._coordinator.leave()
        with contextlib.suppress(RuntimeError):  # closed already
            # The save still needs the other thread.
            self._thread.submit(self._pool.shutdown)
        self._thread.shutdown(wait=False)

    def _plan_for(self, tensors: Mapping[str, Tensor], owner_ranks: Mapping[str, Sequence[int]] | None) -> SavePlan:
        """This rank's plan, made anew only when the layout changed."""
        key = layout_key(tensors)
        if self._planned is None or self._planned[0] != key:
            plan = make_plan(tensors, self._rank, self._ranks, self._options.files_per_rank, owner_ranks)
            self._planned = (key, plan)
        return self._planned[1]

    def _image_for(self, plan: SavePlan) -> StagingBuffer:
        """The warm image of a plan."""
        if self._image is None or self._image.plan is not plan:
            self._image = None  # the old memory goes before the new is asked for
            self._image = StagingBuffer(plan, self._device)
        return self._image

    def _snapshot(self, plan: SavePlan, tensors: Mapping[str, Tensor]) -> StagingBuffer | None:
        """What is copied in the call; None where the tensors themselves are written."""
        if self._mode is AsyncMode.disabled:
            return None
        if self._preparing is not None:
            wait([self._preparing])
            self._preparing = None
        image = self._image_for(plan)
        if self._device.type == "cuda":
            self._copied = self._queue_copies(image, tensors)
        elif self._mode is not AsyncMode.async_with_pinned_mem:
            image.copy_from(tensors)
            self._staged.set()
        return image

    def _queue_copies(self, image: StagingBuffer, tensors: Mapping[str, Tensor]) -> Any:
        """Copies on a side stream, after what is queued already; returns the event at their end."""
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            image.copy_from(tensors)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(stream)
        return copied

    def _save(self, work: _SaveJob, manifest: Manifest, started: float) -> SaveResult:
        """The background part: stage where that is left to do, write, commit; never raises."""
        step, final = manifest.step, False
        key = f"{step}-{self._saves}"
        self._committer.begin(step)
        place = WorkingPlace(folder=self._committer.working_place(step), writer=self._committer.writer)
        try:
            report = self._write_own(work, step)
            self._progress.commit()
            self._coordinator.report(key, report, place)
            if self._rank == 0:
                error, final = self._commit(manifest, self._coordinator.collect(key, place))
                self._coordinator.publish_result(key, error, place)
            else:
                error = self._coordinator.await_result(key, lambda: self._committer.is_committed(step), place)
        except Exception as failure:
            log.exception("saving step %d failed", manifest.step)
            error = str(failure)
        self._progress.end(saved=not error)
        url = None if error else self._folder.child(step_folder_name(manifest.step)).url
        seconds = time.perf_counter() - started
        return SaveResult(step=manifest.step, url=url, error=error, seconds=seconds, final=final)

    def _write_own(self, work: _SaveJob, step: int) -> Report:
        """Makes this rank's files durable, its manifest last."""
        plan = work.plan
        try:
            hashes = self._stage(work)
            if work.problem is not None:
                return {"error": work.problem}
            folder = self._committer.working_place(step)
            self._committer.check_lease()
            self._committer.check_absent(step)
            folder.make()
            _check_room(folder, plan.total_bytes)
            names = [file_name(self._rank, index, self._committer.writer) for index in range(len(plan.file_bytes))]
            if work.image is None:
                hashes = write_tensors(folder, names, plan, work.tensors, self._progress)
            else:
                hashes = write_image(folder, names, work.image, self._pool, hashes, self._progress)
            body = rank_manifest(plan, names, [hashes[item.chunk.name] for item in plan.items])
            folder.write(rank_manifest_name(self._rank, self._committer.writer), body, flush=self._rank != 0)
        except OSError as error:
            return {"error": f"{error.strerror or error} ({self._folder.url})"}
        except Exception as error:
            log.exception("saving step %d failed", step)
            return {"error": str(error)}
        return report_of(body)

    def _stage(self, work: _SaveJob) -> Hashes | None:
        """Completes the snapshot; the hashes, where they came with it."""
        try:
            if work.copied is not None:
                work.copied.synchronize()
            elif work.image is not None and not self._staged.is_set():
                return work.image.copy_hashed(work.tensors)
            return None
        finally:
            self._staged.set()

    def _commit(self, manifest: Manifest, reports: Sequence[Report]) -> tuple[str | None, bool]:
        """On rank 0: makes the step valid where every rank has done its part; the error, and whether it is final."""
        errors = [f"rank {rank}: {r['error']}" for rank, r in enumerate(reports) if r["error"] is not None]
        final = False
        try:
            if not errors:
                self._committer.commit(manifest, reports)
                return None, False
            # A lost lease shows as an error of this rank's, too.
            self._committer.check_lease()
        except LeaseLostError as lost:
            errors, final = [str(lost)], True
        except OSError as failure:
            errors.append(f"rank 0: {failure.strerror or failure} ({self._folder.url})")
        except Exception as failure:
            log.exception("committing step %d failed", manifest.step)
            errors.append(f"rank 0: {failure}")
        try:
            if not final:
                self._committer.discard(manifest.step)
        except OSError as failure:
            log.warning("the incomplete step %d cannot be removed yet: %s", manifest.step, failure)
        return "; ".join(errors), final


def _lower_priority() -> None:
    """Gives training's threads priority over this one; on Linux each thread has its own niceness."""
    with suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def _check_room(folder: Storage, needed: int) -> None:
    """Raises OSError before anything is written to a disk that cannot hold it."""
    free = folder.free_bytes()
    if free is not None and free < needed:
        raise OSError(errno.ENOSPC, f"No space left on device: {needed >> 20} MiB are needed, {free >> 20} are free")
