"""Trackio. The only file that imports it."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

from regrow.trainer.hooks.logger import LoggedRun, LoggerHook, RunEnd, Store, measured
from regrow.trainer.hooks.logger_config import TrackioConfig, TrackioHookConfig

__all__ = ["TrackioHook"]

_FOLDER = "TRACKIO_DIR"


@final
class TrackioHook(LoggerHook):
    """See `TrackioConfig`. A lineage that goes back is a run of its own, in the run's group."""

    NAME = "trackio"
    TITLE = "Trackio"
    PACKAGES = ("trackio",)

    def __init__(self, config: TrackioHookConfig) -> None:
        super().__init__()
        self._config = config.settings

    def open_store(self, run: LoggedRun) -> Store:
        """The run in the project."""
        given = self._config.folder
        folder = (run.run_dir.parent / "trackio" if given is None else Path(given).expanduser()).absolute()
        # Read once, when it is imported.
        os.environ[_FOLDER] = str(folder)
        return _TrackioRun(self._config, run, folder)


@final
class _TrackioRun(Store):
    """A run in Trackio's database, written to as its own sender does, but for that errors are not swallowed."""

    def __init__(self, config: TrackioConfig, run: LoggedRun, folder: Path) -> None:
        from trackio.sqlite_storage import SQLiteStorage
        from trackio.utils import TRACKIO_DIR

        if folder != TRACKIO_DIR:
            raise ValueError(f"this process has used Trackio with {TRACKIO_DIR}, and cannot with {folder} any more")
        SQLiteStorage.validate_project_name(config.project)
        self._storage, self._project, self._run = SQLiteStorage, config.project, run
        group = config.group or run.sweep or (run.run_name if run.line.branch else None)
        self._settings: dict[str, Any] | None = {**run.config, "_Group": group}

    def last_step(self) -> int:
        return self._storage.get_last_step(self._project, self._run.name, run_id=self._run.key) or 0

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        steps = [row["step"] for row in rows]
        self._storage.bulk_log(
            self._project,
            self._run.name,
            [measured(row) for row in rows],
            steps=steps,
            # A row that is there with this id is left alone.
            log_ids=[f"{self._run.key}-{step}" for step in steps],
            config=self._settings,
            run_id=self._run.key,
        )
        # Once is enough.
        self._settings = None

    def close(self, end: RunEnd | None) -> None:
        """Each write is complete by itself."""
