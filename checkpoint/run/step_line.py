"""Which steps of a folder descend from each other, where no run's record says it: the steps' own manifests do."""

import logging
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import final

from regrow.checkpoint.errors import CheckpointError, StepNotFoundError
from regrow.checkpoint.format.manifest import Manifest
from regrow.checkpoint.format.stored_step import StoredStep
from regrow.checkpoint.policy.lineage import Lineage, StartKind
from regrow.checkpoint.run.catalog import Catalog, newest_lineages

__all__ = ["StepLine"]

log = logging.getLogger(__name__)


@final
class StepLine:
    """The line of steps that one process, or the ranks of one job, continue.

    Args:
        catalog: of the folder.

    Attributes:
        lineages: of the steps to come, oldest first; none before a step was loaded or the first is saved.
        step: the last one that was loaded or saved; None before.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._damaged: dict[int, str] = {}
        self.lineages: tuple[Lineage, ...] = ()
        self.step: int | None = None

    def steps(self) -> list[int]:
        """The complete steps to continue from, ascending."""
        with self._folder_errors():
            scan = self._catalog.scan()
        lineages = self.lineages or newest_lineages(scan.complete)
        return [s.step for s in scan.line(lineages) if s.resumable]

    def choose(self, wanted: int | None, damaged: Mapping[int, str]) -> StoredStep | None:
        """The step to load; changes nothing.

        Args:
            wanted: its number; None for the newest.
            damaged: steps that were found to be damaged when they were read, with what is wrong.

        Returns:
            None where the newest is wanted and there is none.

        Raises:
            StepNotFoundError: the wanted one is not there.
            CheckpointError: steps are there, but none of them is sound.
        """
        with self._folder_errors():
            scan = self._catalog.scan()
            visible = scan.line(newest_lineages(scan.complete))
            if wanted is not None:
                found = next((s for s in visible if s.step == wanted), None)
                if found is None:
                    raise StepNotFoundError(wanted, [s.step for s in visible], self._catalog.folder.url, "step")
                return found
            sound = [s for s in visible if s.resumable and s.step not in damaged]
            known = self._real_problems(scan.damaged) | dict(damaged)
        if not sound and known:
            raise CheckpointError(
                f"{self._catalog.folder.url} must hold a sound step, but {', '.join(map(str, sorted(known)))} cannot "
                f"be used and no other is left ({next(iter(known.values()))}); use another folder to start afresh"
            )
        return sound[-1] if sound else None

    def continue_from(self, manifest: Manifest, damaged: Mapping[int, str]) -> None:
        """What is saved from now on descends from this step.

        Args:
            manifest: of the step that was loaded.
            damaged: newer ones that could not be.
        """
        self._damaged |= damaged
        self.lineages = manifest.lineages or (Lineage(id=manifest.lineage),)
        self.step = manifest.step

    def prepare_folder(self) -> tuple[Lineage, ...]:
        """Before the first save: what the line does not descend from is set aside.

        Returns:
            The lineages of the steps to come.

        Raises:
            CheckpointError: nothing was loaded, although the folder holds steps; or the storage fails.
        """
        with self._folder_errors():
            scan = self._catalog.scan()
            lineages = self.lineages
            if not lineages:
                self._check_empty([*(s.step for s in scan.complete), *self._real_problems(scan.damaged)])
                lineages = (Lineage(id=_new_id()),)
            newer = [s.step for s in scan.line(lineages) if s.step not in self._damaged]
            if self.step is not None and newer and newer[-1] > self.step:
                # Back at an older step: what follows is another line.
                lineages = (*lineages, _line_from(self.step, lineages[-1].id))
            for line in self._catalog.clean_up(lineages, self._damaged, scan):
                log.warning("%s", line)
        self._damaged = {}
        return lineages

    def _real_problems(self, problems: Mapping[int, str]) -> dict[int, str]:
        """Without what a killed save left under a step's own name."""
        return {step: why for step, why in problems.items() if not self._catalog.is_cut_save(step)}

    def _check_empty(self, held: Sequence[int]) -> None:
        if held:
            raise CheckpointError(
                f"{self._catalog.folder.url} must be loaded from before it is saved into, because it holds step "
                f"{max(held)}; call load first, or use another folder"
            )

    @contextmanager
    def _folder_errors(self) -> Iterator[None]:
        try:
            yield
        except StepNotFoundError:
            # Which is an OSError, too.
            raise
        except OSError as error:
            reason = error.strerror or error
            raise CheckpointError(
                f"{self._catalog.folder.url} cannot be used ({reason}); check the storage"
            ) from error


def _line_from(step: int, parent: str) -> Lineage:
    return Lineage(id=_new_id(), origin=StartKind.step, origin_step=step, parent=parent)


def _new_id() -> str:
    return uuid.uuid4().hex[:8]
