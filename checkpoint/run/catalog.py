"""The steps of one checkpoint folder: finding, setting aside, removing."""

import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from regrow.checkpoint.errors import CheckpointError, DamagedStepError
from regrow.checkpoint.format.manifest import MANIFEST
from regrow.checkpoint.format.step_name import ASIDE, parse_step_name, step_folder_name
from regrow.checkpoint.format.stored_step import StoredStep
from regrow.checkpoint.policy.lineage import Lineage, is_visible
from regrow.checkpoint.policy.retention import RetainableStep, RetentionRule, removable_steps
from regrow.checkpoint.run.lease import HeartbeatMonitor
from regrow.checkpoint.run.leftovers import Leftovers
from regrow.checkpoint.run.reader_lock import held_by_readers
from regrow.checkpoint.storage.base import Storage
from regrow.checkpoint.storage.opening import as_storage

__all__ = ["ASIDE", "PIN", "Catalog", "Scan", "newest_lineages"]

# Where nothing can be renamed, the names of our files bear their writer.
_OWN_FILE = re.compile(r"(rank-[0-9]+|__[0-9]+_[0-9]+)-[0-9a-f]{8}\.")
PIN = "pinned"


class Scan(NamedTuple):
    """What a look through the folder found: one read of each step's manifest.

    Attributes:
        complete: the complete steps of whatever lineage, ascending.
        damaged: the others, with what is wrong.
    """

    complete: list[StoredStep]
    damaged: dict[int, str]

    def line(self, lineages: Sequence[Lineage]) -> list[StoredStep]:
        """The complete steps of the newest lineage's line, ascending."""
        return [s for s in self.complete if is_visible(lineages, s.step, s.manifest.lineage)]


class Catalog:
    """The committed steps in a folder. Only the holder of its lease calls what changes it.

    Args:
        folder: holds `step-N` folders; need not exist yet.
        reader_timeout_s: after which a reader on another host whose lock has not moved counts as dead.
    """

    def __init__(self, folder: Storage | Path | str, reader_timeout_s: float = 60.0) -> None:
        self.folder = as_storage(folder)
        self._reader_timeout_s = reader_timeout_s
        self._watch = HeartbeatMonitor()
        self._leftovers = Leftovers(self.folder, self._watch, reader_timeout_s)

    def step_place(self, step: int) -> Storage:
        """Where the step lies or would lie."""
        return self.folder.child(step_folder_name(step))

    def candidates(self) -> list[int]:
        """The numbers of all that bears the name of a step, ascending, sound or not."""
        return sorted(step for step in map(parse_step_name, self.folder.names()) if step is not None)

    def open(self, step: int) -> StoredStep:
        """A step that is complete, as far as its manifest and the sizes of its files show.

        Raises:
            DamagedStepError: it is not, or cannot be looked at.
            OtherFormatError: another version wrote it.
            CheckpointError: a remote storage does not answer, which says nothing of the step.
        """
        storage = self.step_place(step)
        try:
            opened = StoredStep.open(storage)
        except FileNotFoundError as error:
            raise DamagedStepError(f"{storage.url} is incomplete: it has no {MANIFEST}; use another step") from error
        except OSError as error:
            reason = f"{storage.url} cannot be read ({error.strerror or error})"
            if storage.is_remote:
                raise CheckpointError(f"{reason}; check the storage and try again") from error
            raise DamagedStepError(f"{reason}; use another step") from error
        if opened.step != step:
            # One that was moved here from another step.
            raise DamagedStepError(
                f"{storage.url} must hold step {step}, but its manifest is of step {opened.step}; "
                "the step is damaged, use another one"
            )
        return opened

    def scan(self) -> Scan:
        """Opens every step.

        Raises:
            OtherFormatError: another version wrote one, which may be the newest.
        """
        complete: list[StoredStep] = []
        damaged: dict[int, str] = {}
        for step in self.candidates():
            try:
                complete.append(self.open(step))
            except DamagedStepError as error:
                damaged[step] = str(error)
        return Scan(complete, damaged)

    def entries(self, lineages: Sequence[Lineage]) -> list[StoredStep]:
        """The complete steps of the newest lineage's line, ascending; damaged ones are left out."""
        return self.scan().line(lineages)

    def clear_leftovers(self) -> list[str]:
        """Removes what killed or failed writers and readers left; returns one line for each."""
        return self._leftovers.clear()

    def clean_up(
        self, lineages: Sequence[Lineage], damaged: Mapping[int, str] | None = None, scan: Scan | None = None
    ) -> list[str]:
        """Removes what a killed writer left, and moves away what the newest lineage does not descend from.

        Safe to repeat and to be killed in: every action is one rename or the removal of a partial folder. What
        cannot be moved stays: nothing that is damaged is ever loaded.

        Args:
            lineages: of the run, the newest last.
            damaged: steps that were found to be damaged otherwise, with what is wrong.
            scan: what a look through the folder has found, where nothing was written since.

        Returns:
            One line for each thing done, or that could not be done.
        """
        done = self.clear_leftovers()
        complete, found = self.scan() if scan is None else scan
        problems = found | dict(damaged or {})
        for step, problem in problems.items():
            done += self.clear_step(step, problem)
        for entry in complete:
            lineage = entry.manifest.lineage
            if entry.step not in problems and not is_visible(lineages, entry.step, lineage):
                done += _attempt(
                    f"set step {entry.step} of lineage {lineage} aside",
                    partial(self.quarantine, entry.step, lineage),
                )
        return done

    def clear_step(self, step: int, problem: str) -> list[str]:
        """Gets a damaged step out of the way; returns one line of what was done.

        Args:
            step: its number.
            problem: what is wrong with it.
        """
        name = step_folder_name(step)
        if self.is_cut_save(step):
            return _attempt(f"removed the incomplete {name}", partial(self.folder.remove, name))
        return _attempt(f"set step {step} aside: {problem}", partial(self.quarantine, step, "damaged"))

    def is_cut_save(self, step: int) -> bool:
        """Whether a step that was written under its own name is a save of ours that was cut short, nothing else."""
        if self.folder.renames:
            return False
        names = self.step_place(step).names()
        return MANIFEST not in names and any(_OWN_FILE.match(name) for name in names)

    def quarantine(self, step: int, reason: str) -> None:
        """Moves a step to `set-aside/<reason>/`, where only people look for it."""
        target, n = f"{ASIDE}/{reason}/{step_folder_name(step)}", 1
        name = target
        while self.folder.exists(name):
            n += 1
            name = f"{target}.{n}"
        self.folder.move(step_folder_name(step), name)

    def prune(self, rules: Sequence[RetentionRule], lineages: Sequence[Lineage]) -> list[int]:
        """Removes the steps that no rule protects and no process reads; the newest always stays.

        Returns:
            The removed steps.
        """
        self._leftovers.clear_dead_readers()
        entries = self.entries(lineages)
        # Weights alone cannot be continued from: the newest step that can stays whatever comes after it.
        last = max((e.step for e in entries if e.resumable), default=-1)
        stored = [
            RetainableStep(step=e.step, pinned=e.storage.exists(PIN) or e.step == last, metrics=e.metrics())
            for e in entries
        ]
        return self.remove_unread(removable_steps(rules, stored))

    def remove_unread(self, steps: Sequence[int]) -> list[int]:
        """Removes those of the steps that no process reads; returns which."""
        removed = [
            step for step in steps if not held_by_readers(self.step_place(step), self._watch, self._reader_timeout_s)
        ]
        for step in removed:
            self.remove(step)
        return removed

    def remove(self, step: int) -> None:
        """Removes a step, whatever it is."""
        name = step_folder_name(step)
        if self.folder.renames:
            # Renamed first: a removal that is cut short must not leave half a step under its real name.
            trash_name = f"{name}.removing-{uuid.uuid4().hex[:8]}"
            self.folder.move(name, trash_name)
            name = trash_name
        self.folder.remove(name)


def newest_lineages(complete: Sequence[StoredStep]) -> tuple[Lineage, ...]:
    """The lineages of the newest line of steps, by the steps themselves; none where there is no step."""
    if not complete:
        return ()
    newest = max(complete, key=lambda s: (len(s.manifest.lineages), s.step)).manifest
    return newest.lineages or (Lineage(id=newest.lineage),)


def _attempt(line: str, act: Callable[[], None]) -> list[str]:
    """Does something that the start does not depend on; the line that tells of it."""
    try:
        act()
    except OSError as error:
        return [f"not done ({error.strerror or error}): {line}"]
    return [line]
