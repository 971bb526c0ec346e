"""Saving and resuming for any training loop: the whole engine behind one class."""

import logging
import operator
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, SupportsFloat, SupportsIndex, TypeVar, final

import torch
import torch.distributed as dist
from torch import Tensor

from regrow.checkpoint.checkpointer_options import CheckpointerOptions
from regrow.checkpoint.config import AsyncMode
from regrow.checkpoint.errors import CheckpointError, LastSaveError
from regrow.checkpoint.format.layout import local_tensor
from regrow.checkpoint.format.manifest import Manifest
from regrow.checkpoint.format.stored_step import StoredStep
from regrow.checkpoint.inspect.maintenance import pin, unpin, verify
from regrow.checkpoint.load.agreement import load_agreed, storage_errors
from regrow.checkpoint.load.loading import load_step
from regrow.checkpoint.nested_state import join_state, split_state
from regrow.checkpoint.policy.retention import KeepLatest
from regrow.checkpoint.ranks import on_every_rank, on_first_rank, rank_and_count
from regrow.checkpoint.run.catalog import Catalog
from regrow.checkpoint.run.lease import FencingToken, Lease, LeaseLostError, acquire_lease
from regrow.checkpoint.run.reader_lock import reading
from regrow.checkpoint.run.step_line import StepLine
from regrow.checkpoint.save.saver import SaveResult, SaverOptions, StepSaver
from regrow.checkpoint.save_request import check_tensors, checked_metrics, checked_state, checked_step
from regrow.checkpoint.storage.opening import open_storage
from regrow.checkpoint.stored_state import empty_tensors, memory_for, state_of

__all__ = ["Checkpointer"]

log = logging.getLogger(__name__)

T = TypeVar("T")
_MODES = {"sync": "disabled", "async": "async", "pinned": "async_with_pinned_mem"}


@final
class Checkpointer:
    """Saves and loads the state of a training loop, in one process or on every rank (DDP, FSDP2, …).

    Every rank constructs one and calls `load`, `save`, `wait` and `close` in the same order. One process at a time
    writes into a folder: a second one is refused, and the successor of a killed one takes over. What is saved is
    complete or not there, and every byte is verified when it is loaded.

    Args:
        folder: a path or URL; holds `step-N` folders, made when it is missing.
        mode: what `save` waits for. `sync` returns when the step is durable, `async` when the tensors are copied,
            `pinned` at once: the copy runs beside the next forward and backward pass, and `wait_staged` must be
            called before the tensors change.
        group: of all ranks, on the CPU; made where torch.distributed is initialised and none is given.
        options: see `CheckpointerOptions`.

    Raises:
        ValueError: an unknown mode, or a folder that cannot be a storage.
        LeaseHeldError: another process writes there.
        CheckpointError: the folder cannot be read or written.
    """

    def __init__(
        self,
        folder: str | Path,
        mode: Literal["sync", "async", "pinned"] = "async",
        *,
        group: dist.ProcessGroup | None = None,
        options: CheckpointerOptions | None = None,
    ) -> None:
        if mode not in _MODES:
            raise ValueError(f"mode must be one of {', '.join(_MODES)}, but is {mode!r}; use async")
        self._options, self._mode = options or CheckpointerOptions(), AsyncMode[_MODES[mode]]
        self._folder = open_storage(folder, self._options.storage_options)
        self._group = group if group is not None else _cpu_group()
        self._catalog = Catalog(self._folder, self._options.lease_timeout_s)
        self._rules = [KeepLatest(self._options.keep_latest_k), *self._options.rules]
        self._lease: Lease | None = None
        self._ticket: FencingToken | None = None
        self._saver: StepSaver | None = None
        # Whether the folder holds nothing but the line of steps that is continued.
        self._prepared = False
        self._line = StepLine(self._catalog)
        # The step whose save has not been told the end of.
        self._pending: int | None = None
        self._failures, self._failed = 0, ""
        self._retention = ThreadPoolExecutor(1, thread_name_prefix="retention")
        if not self._options.read_only:
            self._ticket = self._on_first(self._take_lease)

    @property
    def step(self) -> int | None:
        """The last step that was loaded or saved, as far as is known; None before."""
        return self._line.step if self._pending is None else self._pending

    def load(
        self, tensors: Mapping[str, Tensor], step: SupportsIndex | Literal["newest"] | None = "newest"
    ) -> dict[str, Any] | None:
        """Reads a step into existing tensors, on whatever number of ranks saved it.

        Where a rank finds the newest step damaged, all ranks load the one before. The tensors' values are undefined
        where this raises.

        Args:
            tensors: by the names they were saved under; DTensors receive this rank's part. May be a part of what was
                saved.
            step: its number, or the newest that is sound (None, too). Saving after an older step sets the newer ones
                aside.

        Returns:
            The state that was saved with the tensors; None where the folder holds no step.

        Raises:
            StepNotFoundError: that step is not there.
            DamagedStepError: that step is damaged.
            CheckpointError: a name is missing, or has another shape or dtype; or no step is sound.
        """
        found = self._load(step, lambda _: tensors)
        return None if found is None else found[0]

    def load_state(self, step: SupportsIndex | Literal["newest"] | None = "newest") -> dict[str, Any] | None:
        """A state that `save_state` (or `save`, of what `split_state` gave) saved, its tensors whole and on the CPU.

        For one process and for ranks that each hold all of the state (DDP); with sharded state, `load` reads this
        rank's part alone.

        Args:
            step: as `load`.

        Returns:
            The nested state; None where the folder holds no step.

        Raises:
            CheckpointError: as `load`; or the step was saved by `save`, so that its tensors have names alone.
        """
        found = self._load(step, memory_for)
        return None if found is None else join_state(*found)

    def save_state(
        self, step: SupportsIndex, state: Mapping[str, Any], *, metrics: Mapping[str, SupportsFloat] | None = None
    ) -> None:
        """Saves a nested state (`state_dict()` of a model, an optimizer, a scheduler) as `save` does.

        Args:
            step: as `save`.
            state: mappings, lists, tuples, tensors, numbers, text and None, nested as deep as wanted.
            metrics: as `save`.

        Raises:
            ValueError: it holds something else.
            CheckpointError: as `save`.
        """
        tensors, plain = self._on_every(lambda: split_state(state))
        self.save(step, tensors, plain, metrics=metrics)

    def save(
        self,
        step: SupportsIndex,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any] | None = None,
        *,
        metrics: Mapping[str, SupportsFloat] | None = None,
        owner_ranks: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """Saves a step, after the save before it has ended. What one rank refuses is refused on all ranks.

        Args:
            step: its number, above that of every step before it; one whose save has failed can be saved again.
            tensors: by flat name. A plain tensor is taken for equal on all ranks that have its name, and is written
                once; of a DTensor each rank writes its part.
            state: what else is needed to continue, as JSON can hold it; the first rank's counts.
            metrics: measured at this step, for retention rules and listings.
            owner_ranks: for tensors that not every rank holds: the ranks that do.

        Raises:
            ValueError: a step, name, state or metric that cannot be saved.
            LeaseLostError: another process has taken the folder over.
            CheckpointError: saves keep failing; in `sync` mode also where this one has failed.
        """
        manifest = self._on_every(lambda: self._checked_manifest(step, tensors, state, metrics))
        if not self._prepared:
            self._line.lineages = self._on_first(self._line.prepare_folder)
            self._prepared = True
        if self._saver is None:
            self._saver = self._open_saver(tensors)
        lineages = self._line.lineages
        results = self._saver.save(
            tensors, replace(manifest, lineage=lineages[-1].id, lineages=lineages), owner_ranks
        )
        self._pending = manifest.step
        self._handle(results)
        if self._mode is AsyncMode.disabled and self._failures:
            raise CheckpointError(self._failed)

    def wait_staged(self) -> None:
        """Returns when the tensors of the last save may change; call it before the optimizer's step."""
        if self._saver is not None:
            self._saver.wait_staged()

    def wait(self) -> None:
        """Returns when the last save is durable.

        Raises:
            LastSaveError: it has failed.
        """
        self._end_save()
        if self._failures:
            raise LastSaveError(self._failed)

    def steps(self) -> list[int]:
        """The complete steps to continue from, ascending; what this rank sees now."""
        return self._line.steps()

    def verify(self, step: int) -> list[str]:
        """Reads all of a step and compares it with its hashes, in this process.

        Returns:
            What is wrong, a sentence each; none where the step is sound.
        """
        (report,) = verify(self._catalog.step_place(step))
        return [str(problem) for problem in report["problems"]]

    def pin(self, step: int) -> None:
        """Keeps a step for good, whatever retention says."""
        pin(self._catalog.step_place(step))

    def unpin(self, step: int) -> None:
        """The inverse of `pin`."""
        unpin(self._catalog.step_place(step))

    def close(self) -> None:
        """Waits for the last save and lets the next writer in.

        Raises:
            LastSaveError: the last save has failed.
        """
        try:
            self.wait()
        finally:
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            # A failed save must not hide the error that ended the loop, nor ranks hold it back that it has ended.
            if self._saver is not None:
                self._saver.hurry()
            self._release()

    def _release(self) -> None:
        if self._saver is not None:
            self._saver.close()
        self._retention.shutdown()
        if self._lease is not None:
            self._lease.release()
            self._lease = None

    def _load(
        self, step: SupportsIndex | str | None, targets: Callable[[StoredStep], Mapping[str, Tensor]]
    ) -> tuple[dict[str, Any], Mapping[str, Tensor]] | None:
        """The state of a step, and the tensors that it was read into; None where there is no step."""
        wanted = _wanted(step)
        self._on_every(self._end_save)
        # The first rank has opened the step to choose it.
        opened: list[StoredStep] = []

        def choose(damaged: Mapping[int, str]) -> int | None:
            chosen = self._line.choose(wanted, damaged)
            opened[:] = [chosen] if chosen is not None else []
            return None if chosen is None else chosen.step

        def read(number: int | None) -> tuple[StoredStep, Mapping[str, Tensor]] | None:
            return None if number is None else self._read(opened[0] if opened else None, number, targets)

        found = load_agreed(choose, read, lambda number: number if wanted is None else None, self._group)
        if found.result is None:
            return None
        loaded, tensors = found.result
        self._line.continue_from(loaded.manifest, found.damaged)
        self._prepared = False
        return state_of(loaded), tensors

    def _on_every(self, act: Callable[[], T]) -> T:
        return on_every_rank(act, self._group, ValueError)

    def _on_first(self, act: Callable[[], T]) -> T:
        return on_first_rank(act, self._group, CheckpointError)

    def _take_lease(self) -> FencingToken:
        lease = acquire_lease(
            self._folder,
            self._options.lease_timeout_s,
            self._folder.url,
            setting="folder",
            remedy="stop it or choose another folder",
        )
        try:
            for line in self._catalog.clear_leftovers():
                log.info("%s", line)
        except OSError as error:
            lease.release()
            raise CheckpointError(
                f"folder must be one that can be listed, but {self._folder.url} cannot ({error.strerror or error}); "
                "make it so, or choose another folder"
            ) from error
        self._lease = lease
        return lease.ticket

    def _read(
        self, opened: StoredStep | None, number: int, targets: Callable[[StoredStep], Mapping[str, Tensor]]
    ) -> tuple[StoredStep, Mapping[str, Tensor]]:
        folder = self._catalog.step_place(number)
        with storage_errors(folder):
            step = opened if opened is not None else StoredStep.open(folder, check_files=False)
            # The first rank's lock keeps the step for all ranks, which end their reading together.
            with reading(folder) if rank_and_count(self._group)[0] == 0 else nullcontext():
                tensors = targets(step)
                load_step(step, tensors, self._group)
        return step, tensors

    def _checked_manifest(
        self,
        step: SupportsIndex,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any] | None,
        metrics: Mapping[str, SupportsFloat] | None,
    ) -> Manifest:
        """The manifest of what may be saved after the save before, without its lineages; its values are copies."""
        if self._options.read_only:
            raise ValueError("save must not be called where read_only is set; construct a Checkpointer without it")
        self._end_save()
        number = checked_step(step, self._line.step)
        check_tensors(tensors)
        rank, ranks = rank_and_count(self._group)
        train_state = {"step": number, "state": checked_state(state if rank == 0 else None)}
        return Manifest(
            step=number,
            lineage="",
            train_state=train_state | empty_tensors(tensors),
            metrics=checked_metrics(metrics),
            layout={"ranks": ranks},
            versions={"torch": str(torch.__version__)},
        )

    def _open_saver(self, tensors: Mapping[str, Tensor]) -> StepSaver:
        device = next((t.device for t in map(local_tensor, tensors.values()) if t.device.type != "cpu"), None)
        options = SaverOptions(
            files_per_rank=self._options.files_per_rank,
            commit_timeout_s=self._options.commit_timeout_s,
            ticket=self._ticket,
        )
        return StepSaver(self._folder, self._mode, device or torch.device("cpu"), self._group, options)

    def _end_save(self) -> None:
        """Waits for the save before."""
        if self._saver is not None:
            self._handle(self._saver.wait())

    def _handle(self, results: Sequence[SaveResult]) -> None:
        """Tells how saves have ended; on all ranks alike, since each waits for the save before."""
        for result in results:
            self._pending = None
            if result.error is None:
                self._failures, self._line.step = 0, result.step
                if rank_and_count(self._group)[0] == 0:
                    log.info("saved %s, durable after %.2f s", result.url, result.seconds)
                    self._retention.submit(self._prune)
                continue
            self._failures += 1
            self._failed = f"step {result.step} must be saved, but was not ({result.error}); check the storage"
            message = f"step {result.step} was not saved: {result.error}"
            if result.final:
                raise LeaseLostError(message)
            if self._failures >= self._options.max_save_errors:
                raise CheckpointError(f"{message}; {self._failures} saves in a row have failed")
            log.warning("%s; the next one is tried", message)

    def _prune(self) -> None:
        """Retention, beside training: what fails here costs room, not a step."""
        try:
            removed = self._catalog.prune(self._rules, self._line.lineages)
        except (OSError, CheckpointError) as error:
            log.warning("old steps cannot be removed now: %s", error)
            return
        if removed:
            log.info("removed steps %s", ", ".join(str(s) for s in removed))


def _wanted(step: SupportsIndex | str | None) -> int | None:
    """The number of a step to load; None for the newest."""
    if step is None or step == "newest":
        return None
    try:
        # A text is refused as anything else is.
        return operator.index(step)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"step must be a number or 'newest', but is {step!r}; use 'newest'") from None


def _cpu_group() -> dist.ProcessGroup | None:
    """A group of all ranks for small messages; None where this process is alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group: dist.ProcessGroup = dist.new_group(backend="gloo")
    return group
