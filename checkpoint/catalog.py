"""The steps of one checkpoint folder: finding, setting aside, removing."""

import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from checkpoint.commit import step_folder_name
from checkpoint.errors import DamagedStepError
from checkpoint.lease import Watch
from checkpoint.leftovers import Leftovers
from checkpoint.lineage import Lineage, is_visible
from checkpoint.manifest import MANIFEST, Manifest, read_manifest
from checkpoint.reading import held_by_readers
from checkpoint.retention import RetentionRule, StoredStep, removable_steps
from checkpoint.storage.base import Storage
from checkpoint.storage.opening import as_storage

__all__ = ["ASIDE", "PIN", "Catalog", "Entry"]

_STEP = re.compile(r"step-(\d+)")
PIN = "pinned"
ASIDE = "set-aside"


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A committed step."""

    step: int
    place: Storage
    manifest: Manifest

    @property
    def resumable(self) -> bool:
        """Whether training can go on from it: a full state, or the first weights (a seed checkpoint)."""
        return self.manifest.kind == "full" or self.step == 0


class Catalog:
    """The committed steps in a folder. Only the holder of its lease calls what changes it.

    Args:
        folder: holds `step-N` folders; need not exist yet.
        reader_timeout_s: after which a reader on another host whose lock stands still is taken for dead.
    """

    def __init__(self, folder: Storage | Path | str, reader_timeout_s: float = 60.0) -> None:
        self.folder = as_storage(folder)
        self._reader_timeout_s = reader_timeout_s
        self._watch = Watch()
        self._leftovers = Leftovers(self.folder, self._watch, reader_timeout_s)

    def step_place(self, step: int) -> Storage:
        """Where the step lies or would lie."""
        return self.folder.child(step_folder_name(step))

    def candidates(self) -> list[int]:
        """The numbers of all `step-N` folders, ascending, sound or not."""
        matches = (_STEP.fullmatch(name) for name in self.folder.names())
        return sorted(int(m.group(1)) for m in matches if m)

    def entries(self, lineages: Sequence[Lineage]) -> list[Entry]:
        """The complete steps of the newest lineage's line, ascending; damaged ones are left out."""
        found = []
        for step in self.candidates():
            try:
                manifest = self._manifest(step)
            except (FileNotFoundError, DamagedStepError):
                continue
            if is_visible(lineages, step, manifest.lineage):
                found.append(Entry(step=step, place=self.step_place(step), manifest=manifest))
        return found

    def _manifest(self, step: int) -> Manifest:
        """A step's manifest; one that was moved here from another step is damage."""
        manifest = read_manifest(self.step_place(step))
        if manifest.step != step:
            raise DamagedStepError(
                f"{self.step_place(step).url} must hold step {step}, but its manifest is of step {manifest.step}; "
                "the step is damaged, use another one"
            )
        return manifest

    def damaged(self) -> dict[int, str]:
        """The steps that are not complete and sound, with what is wrong."""
        problems: dict[int, str] = {}
        for step in self.candidates():
            try:
                self._manifest(step)
            except FileNotFoundError:
                problems[step] = f"{self.step_place(step).url} has no manifest"
            except DamagedStepError as error:
                problems[step] = str(error)
        return problems

    def tidy(self, lineages: Sequence[Lineage]) -> list[str]:
        """Removes what a killed writer left, and moves away what the newest lineage does not descend from.

        Safe to repeat and to be killed in: every action is one rename or the removal of a partial folder.

        Returns:
            One line for each thing done.
        """
        done = self._leftovers.clear()
        for step, problem in self.damaged().items():
            if not self.folder.renames and not self.step_place(step).exists(MANIFEST):
                # Here a step is written under its own name, so this is a save that was cut short.
                self.folder.remove(step_folder_name(step))
                done.append(f"removed the incomplete {step_folder_name(step)}")
                continue
            self.set_aside(step, "damaged")
            done.append(f"set step {step} aside: {problem}")
        for step in self.candidates():
            lineage = self._manifest(step).lineage
            if not is_visible(lineages, step, lineage):
                self.set_aside(step, lineage)
                done.append(f"set step {step} of lineage {lineage} aside")
        return done

    def set_aside(self, step: int, reason: str) -> None:
        """Moves a step to `set-aside/<reason>/`, where nothing looks for it but a person."""
        target, n = f"{ASIDE}/{reason}/{step_folder_name(step)}", 1
        name = target
        while self.folder.exists(name):
            n += 1
            name = f"{target}.{n}"
        self.folder.move(step_folder_name(step), name)

    def prune(self, rules: Sequence[RetentionRule], lineages: Sequence[Lineage]) -> list[int]:
        """Removes the steps that no rule protects and nobody reads; the newest always stays.

        Returns:
            The removed steps.
        """
        self._leftovers.clear_dead_readers()
        entries = self.entries(lineages)
        # Weights alone cannot be continued from: the newest step that can stays whatever comes after it.
        last = max((e.step for e in entries if e.resumable), default=-1)
        stored = [
            StoredStep(step=e.step, pinned=e.place.exists(PIN) or e.step == last, metrics=e.manifest.metrics)
            for e in entries
        ]
        return self.remove_unread(removable_steps(rules, stored))

    def remove_unread(self, steps: Sequence[int]) -> list[int]:
        """Removes those of the steps that nobody reads; returns which."""
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
            doomed = f"{name}.removing-{uuid.uuid4().hex[:8]}"
            self.folder.move(name, doomed)
            name = doomed
        self.folder.remove(name)
