"""`regrow-eval --watch`: each step that a run commits, evaluated once, while it trains."""

import json
import logging
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, final

from regrow.checkpoint.errors import CheckpointError
from regrow.checkpoint.format.manifest import MANIFEST
from regrow.checkpoint.format.step_name import parse_step_name, step_folder_name
from regrow.checkpoint.run.reader_lock import reading
from regrow.checkpoint.storage.base import Storage
from regrow.errors import ConfigError
from regrow.launch.run.stored_run import stored_config, stored_steps
from regrow.trainer.run_files import CONFIG, RECORD

__all__ = ["watch"]

log = logging.getLogger(__name__)

# Between looks at the run's folder: a save that retention removes sooner than that would be missed.
_POLL_S = 0.2


@final
class _HeldSteps:
    """Keeps the steps of a run from being removed, from when they are seen until they are done with.

    Args:
        folder: holds the steps.
    """

    def __init__(self, folder: Storage) -> None:
        self._folder = folder
        self._held: dict[int, ExitStack] = {}
        self._done: set[int] = set()
        self._lock, self._ending = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._look_often, name="watch", daemon=True)

    def __enter__(self) -> "_HeldSteps":
        self.look()
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._ending.set()
        self._thread.join()
        for held in self._held.values():
            held.close()

    def _look_often(self) -> None:
        while not self._ending.wait(_POLL_S):
            try:
                self.look()
            except OSError as error:
                log.warning("the run's steps cannot be looked at now: %s", error)

    def look(self) -> None:
        """Holds the steps that have come."""
        with self._lock:
            for name in self._folder.names():
                step = parse_step_name(name)
                if step is None or step in self._held or step in self._done:
                    continue
                place, held = self._folder.child(name), ExitStack()
                # A step that is still being written has no manifest; one that is being removed loses it first.
                if place.exists(MANIFEST):
                    held.enter_context(reading(place, survives=True))
                    if place.exists(MANIFEST):
                        self._held[step] = held
                    else:
                        held.close()

    def first(self) -> tuple[int, Storage] | None:
        """The earliest step that is not done with."""
        with self._lock:
            step = min(self._held, default=None)
            return None if step is None else (step, self._folder.child(step_folder_name(step)))

    def done(self, step: int) -> None:
        """Lets go of a step."""
        with self._lock:
            self._done.add(step)
            self._held.pop(step).close()


def watch(run_dir: Path, make: Callable[[], Callable[[Storage], object]]) -> None:
    """Evaluates each step of a run, the earliest first, until the run has finished and all are done.

    Args:
        run_dir: the run's directory.
        make: imports what evaluates one step, while steps are held already; that keeps what it finds, and finds what
            was kept.

    Raises:
        ConfigError: it is no run's directory.
    """
    if not (run_dir / CONFIG).is_file():
        raise ConfigError(f"--watch must be given one run's directory, but {run_dir} is none; give outputs/NAME")
    with _HeldSteps(stored_steps(run_dir, stored_config(run_dir))) as steps:
        evaluate = make()
        while True:
            # Asked first: a step that comes after that is not the last.
            finished = _is_finished(run_dir)
            steps.look()
            found = steps.first()
            if found is not None:
                _evaluate(*found, evaluate)
                steps.done(found[0])
            elif finished:
                return
            else:
                threading.Event().wait(_POLL_S)


def _evaluate(step: int, place: Storage, evaluate: Callable[[Storage], object]) -> None:
    try:
        evaluate(place)
    except CheckpointError as error:
        # One that is damaged, or that another version wrote; those that follow may be sound.
        log.warning("step %d is left out: %s", step, error)


def _is_finished(run_dir: Path) -> bool:
    try:
        record: dict[str, Any] = json.loads((run_dir / RECORD).read_text())
        return bool(record["attempts"][-1]["end"] == "finished")
    except (OSError, ValueError, LookupError, TypeError):
        return False
