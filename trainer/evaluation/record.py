"""`evaluations.jsonl`: what was found beside a run, by step and task, each once."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from regrow.trainer.evaluation.measure import Measured
from regrow.trainer.evaluation.task import Task
from regrow.trainer.jsonlines import read_rows
from regrow.trainer.run_files import EVALUATIONS

__all__ = ["EVALUATIONS", "EvaluationKey", "EvaluationRecord", "fingerprint"]


def fingerprint(task: Task) -> str:
    """Of what a task asks: another text of an item is another task."""
    return hashlib.sha256(repr(task.items).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationKey:
    """What a result is of.

    Attributes:
        step: of the run.
        lineage: of the step, since a run that goes back has the same numbers again.
        task: its name.
        items: see `fingerprint`.
        few_shot: items with their answers before each item.
        seed: of their choice.
        context: tokens that were looked back at most; None: as many as the model takes.
        dtype: that was asked for; None is as stored.
    """

    step: int
    lineage: str
    task: str
    items: str
    few_shot: int
    seed: int
    context: int | None
    dtype: str | None


@final
class EvaluationRecord:
    """The results of a run; several processes may add to them.

    Args:
        path: the file; need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def find(self, key: EvaluationKey) -> Measured | None:
        """What was found before.

        Raises:
            OSError: the file cannot be read.
        """
        wanted = asdict(key)
        for row in read_rows(self._path):
            found = row.get("metrics")
            if isinstance(found, dict) and all(row.get(n) == v for n, v in wanted.items()):
                return {str(n): float(v) for n, v in found.items()}
        return None

    def add(self, key: EvaluationKey, metrics: Mapping[str, float]) -> None:
        """Adds a result, durably, unless it is there already.

        Raises:
            OSError: it cannot be written.
        """
        row: dict[str, Any] = {**asdict(key), "metrics": dict(metrics)}
        with self._locked() as descriptor:
            if self.find(key) is None:
                os.write(descriptor, (json.dumps(row) + "\n").encode())
                os.fsync(descriptor)

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """The file, at its end; what a kill cut short is gone."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            size = os.fstat(descriptor).st_size
            text = os.pread(descriptor, size, 0)
            if not text.endswith(b"\n"):
                os.ftruncate(descriptor, text.rfind(b"\n") + 1)
            yield descriptor
        finally:
            os.close(descriptor)
