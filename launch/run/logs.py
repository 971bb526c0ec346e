"""Where the log lines of a process go: to a rank's file, and to the terminal."""

import logging
import os
import sys
from io import TextIOWrapper
from pathlib import Path

from regrow.trainer.wording import FILE_ONLY

__all__ = ["LogFile", "log_to_console", "log_to_files"]

log = logging.getLogger(__name__)


def log_to_files(run_dir: Path, rank: int, *, console: bool) -> logging.Handler:
    """Sends this rank's log to `logs/rank-N.log`, and to the terminal where asked."""
    if console:
        log_to_console()
    path = run_dir / "logs" / f"rank-{rank}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler: logging.Handler = LogFile(path)
    except OSError as error:
        log.warning("%s cannot be written (%s); this rank goes on without it", path, error.strerror or error)
        handler = logging.NullHandler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s [rank {rank}] %(levelname)s %(message)s"))
    logging.getLogger().addHandler(handler)
    return handler


class LogFile(logging.FileHandler):
    """A log whose disk may be full: that is said once on the terminal, and a traceback for each line helps nobody."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._behind = False

    def _open(self) -> TextIOWrapper:
        # A named pipe would keep this rank waiting for a reader.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        return os.fdopen(os.open(self.baseFilename, flags, 0o644), "a", encoding="utf-8")

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._behind:
            self._behind = True
            sys.stderr.write(f"{self.baseFilename} cannot be written ({error.strerror}); it will miss lines\n")

    def close(self) -> None:
        try:
            super().close()
        except OSError:  # lines that the disk did not take
            self._behind = True


class ConsoleHandler(logging.Handler):
    """Writes to what standard error is at that moment: a progress bar puts itself in its place, below the lines."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, FILE_ONLY, False):
            return
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


def log_to_console() -> None:
    """Plain lines on standard error, once."""
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    if not any(isinstance(h, ConsoleHandler) for h in root.handlers):
        console = ConsoleHandler()
        console.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        root.addHandler(console)
    # torch's own launcher reports every child's end as a warning; the stop record says it better.
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
