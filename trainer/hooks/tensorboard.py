"""TensorBoard. The only file that imports it."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from regrow.trainer.hooks.logger import LoggedRun, LoggerHook, RunEnd, Store, measured
from regrow.trainer.hooks.logger_config import TensorBoardHookConfig

if TYPE_CHECKING:
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

__all__ = ["TensorBoardHook"]


@final
class TensorBoardHook(LoggerHook):
    """See `TensorBoardConfig`. A lineage that goes back has a folder of its own, which TensorBoard shows as a run."""

    NAME = "tensorboard"
    TITLE = "TensorBoard"
    PACKAGES = ("tensorboard",)

    def __init__(self, config: TensorBoardHookConfig) -> None:
        super().__init__()
        self._config = config.settings

    def open_store(self, run: LoggedRun) -> Store:
        """The run's folder of event files."""
        if self._config.folder is None:
            return _EventFiles(run.run_dir / "tensorboard" / run.line.branch)
        return _EventFiles(Path(self._config.folder).expanduser() / run.name)


@final
class _EventFiles(Store):
    """A folder of event files: a new one for each start, since a kill may have cut the last one short."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: EventFileWriter | None = None

    def last_step(self) -> int:
        # Here as below, and not at the top: see `LoggerHook.open_store`.
        from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

        files = sorted(self._folder.glob("events.out.tfevents.*"))
        # What a kill cut short is passed over by the loader.
        steps = (e.step for f in files for e in LegacyEventFileLoader(str(f)).Load() if e.HasField("summary"))
        return max(steps, default=0)

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        if self._writer is None:
            self._writer = EventFileWriter(str(self._folder))
        for row in rows:
            # One record for the whole row, so that a kill leaves all of it or nothing.
            values = [Summary.Value(tag=name, simple_value=value) for name, value in measured(row).items()]
            event = Event(step=row["step"], wall_time=time.time(), summary=Summary(value=values))
            self._writer.add_event(event)
        self._writer.flush()

    def close(self, end: RunEnd | None) -> None:
        if self._writer is not None:
            self._writer.close()
