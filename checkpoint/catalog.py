"""The steps of one checkpoint folder: finding, setting aside, removing."""

import logging
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from checkpoint.errors import DamagedStepError
from checkpoint.files import fsync_folder
from checkpoint.lineage import Lineage, is_visible
from checkpoint.manifest import Manifest, read_manifest
from checkpoint.retention import RetentionRule, StoredStep, removable_steps

__all__ = ["Catalog", "Entry", "step_folder_name"]

log = logging.getLogger(__name__)

_STEP = re.compile(r"step-(\d+)")
_PARTIAL = re.compile(r"step-\d+\.(partial|removing)-.*")
PIN = "pinned"
ASIDE = "set-aside"


def step_folder_name(step: int) -> str:
    """`step-N`."""
    return f"step-{step}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A committed step."""

    step: int
    path: Path
    manifest: Manifest


class Catalog:
    """The committed steps in a folder. Only one process of a run calls what changes it.

    Args:
        folder: holds `step-N` folders; need not exist yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def step_path(self, step: int) -> Path:
        """Where the step lies or would lie."""
        return self.folder / step_folder_name(step)

    def candidates(self) -> list[int]:
        """The numbers of all `step-N` folders, ascending, sound or not."""
        if not self.folder.is_dir():
            return []
        matches = (_STEP.fullmatch(p.name) for p in self.folder.iterdir())
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
                found.append(Entry(step=step, path=self.step_path(step), manifest=manifest))
        return found

    def _manifest(self, step: int) -> Manifest:
        """A step's manifest; one that was moved here from another step is damage."""
        manifest = read_manifest(self.step_path(step))
        if manifest.step != step:
            raise DamagedStepError(
                f"{self.step_path(step)} must hold step {step}, but its manifest is of step {manifest.step}; "
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
                problems[step] = f"{self.step_path(step)} has no manifest"
            except DamagedStepError as error:
                problems[step] = str(error)
        return problems

    def tidy(self, lineages: Sequence[Lineage]) -> list[str]:
        """Removes what a killed writer left, and moves away what the newest lineage does not descend from.

        Safe to repeat and to be killed in: every action is one rename or the removal of a partial folder.

        Returns:
            One line for each thing done.
        """
        if not self.folder.is_dir():
            return []
        done = []
        for path in sorted(self.folder.iterdir()):
            if _PARTIAL.fullmatch(path.name):
                shutil.rmtree(path)
                done.append(f"removed the incomplete {path.name}")
        for step, problem in self.damaged().items():
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
        target = self.folder / ASIDE / reason
        target.mkdir(parents=True, exist_ok=True)
        name, n = step_folder_name(step), 1
        while (target / name).exists():
            n += 1
            name = f"{step_folder_name(step)}.{n}"
        self.step_path(step).rename(target / name)
        fsync_folder(self.folder)

    def prune(self, rules: Sequence[RetentionRule], lineages: Sequence[Lineage]) -> list[int]:
        """Removes the steps that no rule protects; the newest always stays.

        Returns:
            The removed steps.
        """
        entries = self.entries(lineages)
        stored = [
            StoredStep(step=e.step, pinned=(e.path / PIN).exists(), metrics=e.manifest.metrics) for e in entries
        ]
        removed = removable_steps(rules, stored)
        for step in removed:
            # Renamed first: a removal that is cut short must not leave half a step under its real name.
            doomed = self.folder / f"{step_folder_name(step)}.removing-0"
            self.step_path(step).rename(doomed)
            shutil.rmtree(doomed)
        return removed
