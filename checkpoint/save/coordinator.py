"""How ranks report to rank 0 that their part of a step is durable, and learn whether it became valid.

No collectives, and nothing of the training's process group: a connection of the saver's own to the store that the
ranks met in, and the files themselves where there is no such store or it fails.
"""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch.distributed as dist
import xxhash

from regrow.checkpoint.format.rank_manifest import rank_failure_name, rank_manifest_name
from regrow.checkpoint.storage.base import Storage
from regrow.torch_compat import default_store

__all__ = ["Report", "SaveCoordinator", "WorkingPlace", "own_store", "report_of"]

log = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.001, 0.05
# Ranks wait for the verdict longer than rank 0 for them, so that they hear why it failed.
_PATIENCE = 1.5

# What a rank in a hurry still waits for the others: they may have ended their parts when it did.
_GRACE_S = 2.0

# `error`, or `files` (sizes), `hash` of the rank's manifest, and its `plan`.
Report = dict[str, Any]


def own_store() -> dist.Store | None:
    """Another connection to the store of the default process group; None where it takes no second one."""
    store: Any = default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if isinstance(store, dist.TCPStore):
        # A connection serves one call at a time: waiting on the shared one would block training.
        return dist.TCPStore(store.host, store.port, is_master=False, wait_for_workers=False)
    return store if isinstance(store, dist.HashStore) else None


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class WorkingPlace:
    """Where one attempt at a step is written, and where its ranks tell each other by files that they have failed.

    Attributes:
        folder: of this attempt; need not exist.
        writer: see `Manifest`.
    """

    folder: Storage
    writer: str = ""

    def is_settled(self, ranks: int) -> bool:
        """Whether so many ranks have written their parts, or one says that it could not."""
        there = self.folder.sizes().keys()
        if any(rank_failure_name(rank, self.writer) in there for rank in range(ranks)):
            return True
        return there >= {rank_manifest_name(rank, self.writer) for rank in range(ranks)}

    def failure(self, rank: int) -> str | None:
        """Why a rank failed, where it could say so."""
        try:
            return self.folder.read(rank_failure_name(rank, self.writer)).decode(errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write_failure(self, rank: int, reason: str) -> None:
        """Leaves word of a failure; where that fails too, the other ranks wait until their time is over."""
        try:
            self.folder.make()
            self.folder.write(rank_failure_name(rank, self.writer), reason.encode())
        except OSError as error:
            log.warning("the other ranks cannot be told that the save failed (%s): %s", error, reason)


@final
class SaveCoordinator:
    """One per saver, for one save at a time.

    Args:
        rank: of this process.
        ranks: how many there are.
        store: see `own_store`.
        token: tells this run of the ranks from others that meet in the same store.
        timeout_s: after which a rank that has not reported counts as dead.
    """

    def __init__(self, rank: int, ranks: int, store: dist.Store | None, token: str, timeout_s: float) -> None:
        self._rank, self._ranks, self._timeout_s = rank, ranks, timeout_s
        self._store = None if store is None else dist.PrefixStore(f"regrow-save-{token}", store)
        self._spent: list[str] = []
        self._own: Report = {}
        self._hurried_at: float | None = None

    def hurry(self) -> None:
        """From here on, other ranks are waited for as little as those need that are done, too."""
        self._hurried_at = time.monotonic()

    def leave(self) -> None:
        """Says that this rank saves nothing more: whoever waits for it need not, but for what it is at just now."""
        try:
            if self._store is not None:
                self._store.set(f"left/{self._rank}", "")
                self._store.add("left/count", 1)
        except RuntimeError as error:
            self._give_up_store(error)

    def _has_left(self, store: dist.Store, rank: int | None = None) -> bool:
        """Whether a rank, or any of them, saves nothing more; from then on nobody is waited for long."""
        left = store.add("left/count", 0) > 0 and (rank is None or store.check([f"left/{rank}"]))
        if left and self._hurried_at is None:
            self.hurry()
        return bool(left)

    def report(self, key: str, report: Report, place: WorkingPlace) -> None:
        """Tells rank 0 how this rank's part ended."""
        self._own = report
        try:
            if self._store is not None:
                self._store.set(f"{key}/{self._rank}", json.dumps(report))
                self._store.add(f"{key}/count", 1)
        except RuntimeError as error:
            self._give_up_store(error)
        # Where it has not failed, its manifest says so; rank 0 tells the others in `publish_result`.
        if self._store is None and self._rank > 0 and report["error"] is not None:
            place.write_failure(self._rank, report["error"])

    def collect(self, key: str, place: WorkingPlace) -> list[Report]:
        """On rank 0: all ranks' reports; of one that is missing after the time-out, an error."""
        deadline = time.monotonic() + self._timeout_s
        try:
            if self._store is not None:
                return self._collect_from_store(self._store, key, place, deadline)
        except RuntimeError as error:
            self._give_up_store(error)
        return self._collect_from_files(place, deadline)

    def _collect_from_store(self, store: dist.Store, key: str, place: WorkingPlace, deadline: float) -> list[Report]:
        everyone = range(self._ranks)

        def settled() -> bool:
            if store.add(f"{key}/count", 0) >= self._ranks:
                return True
            # One that ended in the middle of its report may not have been counted.
            return self._has_left(store) and store.check([f"{key}/{rank}" for rank in everyone])

        self._poll(settled, deadline)
        reports: list[Report] = []
        for rank in everyone:
            name = f"{key}/{rank}"
            there = store.check([name])
            reports.append(json.loads(store.get(name)) if there else self._report_from_file(rank, place, deadline))
        self._forget(store)
        self._spent = [*(f"{key}/{rank}" for rank in everyone), f"{key}/count", f"{key}/verdict"]
        return reports

    def _collect_from_files(self, place: WorkingPlace, deadline: float) -> list[Report]:
        if self._ranks > 1 and self._own["error"] is None:
            self._poll(lambda: place.is_settled(self._ranks), deadline)
        return [
            self._own if rank == self._rank else self._report_from_file(rank, place, deadline)
            for rank in range(self._ranks)
        ]

    def _report_from_file(self, rank: int, place: WorkingPlace, deadline: float) -> Report:
        """The report of a rank of which the store knows nothing."""
        try:
            return report_of(place.folder.read(rank_manifest_name(rank, place.writer)))
        except (FileNotFoundError, NotADirectoryError):
            late = time.monotonic() > deadline
            silence = f"did not report within {self._timeout_s:g} s" if late else "had not reported by then"
            return {"error": place.failure(rank) or silence}

    def publish_result(self, key: str, verdict: str | None, place: WorkingPlace) -> None:
        """On rank 0: tells the others how the step ended; None is well."""
        try:
            if self._store is not None:
                self._store.set(f"{key}/verdict", json.dumps(verdict))
        except RuntimeError as error:
            self._give_up_store(error)
        if self._store is None and self._ranks > 1 and verdict is not None:
            place.write_failure(0, verdict)

    def await_result(self, key: str, is_committed: Callable[[], bool], place: WorkingPlace) -> str | None:
        """On the other ranks: what rank 0 announced.

        Args:
            key: of this save.
            is_committed: looks at the storage, for want of a store.
            place: where rank 0 leaves why it failed, likewise.
        """
        deadline = time.monotonic() + self._timeout_s * _PATIENCE
        try:
            store = self._store
            if store is not None:
                name = f"{key}/verdict"

                def said() -> bool:
                    if store.check([name]):
                        return True
                    self._has_left(store, 0)
                    return False

                if not self._poll(said, deadline):
                    # Rank 0 may have lost the store alone.
                    return None if is_committed() else "rank 0 did not say in time whether the step is complete"
                found: str | None = json.loads(store.get(name))
                return found
        except RuntimeError as error:
            self._give_up_store(error)
        self._poll(lambda: is_committed() or place.failure(0) is not None, deadline)
        return None if is_committed() else place.failure(0) or "the step did not become complete in time"

    def _poll(self, condition: Callable[[], bool], deadline: float) -> bool:
        """Asks again and again, ever more slowly; false when the time is over."""
        pause, began = _FIRST_PAUSE_S, time.monotonic()
        while not condition():
            hurried_at = self._hurried_at
            end = deadline if hurried_at is None else min(deadline, max(began, hurried_at) + _GRACE_S)
            if time.monotonic() > end:
                return False
            time.sleep(pause)
            pause = min(pause * 1.3, _LONGEST_PAUSE_S)
        return True

    def _forget(self, store: dist.Store) -> None:
        """Removes the keys of the save before: every rank has read them, since every rank has reported again."""
        for name in self._spent:
            store.delete_key(name)

    def _give_up_store(self, error: RuntimeError) -> None:
        log.warning("the ranks' store fails (%s); saves are agreed on by files from here on", error)
        self._store = None


def report_of(body: bytes) -> Report:
    """The report that a rank's manifest is."""
    head = json.loads(body)
    return {
        "error": None,
        "files": head["files"],
        "bytes": len(body),
        "hash": xxhash.xxh3_128_hexdigest(body),
        "plan": head["plan"],
    }
