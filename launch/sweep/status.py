"""A sweep as an object: its runs in `sweep.json`, and what each of them has come to. No torch, no Hydra."""

import fcntl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from regrow.checkpoint.files import read_json, write_json
from regrow.checkpoint.format.step_name import parse_step_name
from regrow.checkpoint.storage.base import Storage
from regrow.checkpoint.storage.opening import is_url, open_storage
from regrow.launch.config.errors import UserError
from regrow.launch.config.plugins import UserPackages
from regrow.launch.exit_code import ExitCode
from regrow.launch.sweep.slurm_jobs import Job
from regrow.trainer.jsonlines import read_rows
from regrow.trainer.report.columns import read_columns, read_evaluations
from regrow.trainer.run_files import EVALUATIONS, METRICS
from regrow.trainer.run_folders import run_status
from regrow.trainer.run_record import RunRecord

__all__ = [
    "FINAL",
    "RunFailed",
    "RunStatus",
    "Sweep",
    "SweepRun",
    "inspect_run",
    "open_sweep",
    "result_of",
    "run_name_override",
]

FILE = "sweep.json"
_PROGRAM, _FORMAT = "regrow sweep", 1
_HISTORY = "slurm.jsonl"
# States that nothing but the user changes.
FINAL = ("finished", "failed", "refused", "stuck", "gave up", "stopped", "lost")
_EVENTS = {"refused": "refused", "stuck": "stuck", "gave_up": "gave up", "failed": "failed", "stopped": "stopped"}


class RunFailed(Exception):
    """A run of a sweep did not finish; its message is the whole explanation.

    Args:
        message: one sentence.
        exit_code: for the command.
    """

    def __init__(self, message: str, exit_code: int = ExitCode.failed) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(kw_only=True, slots=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        name: from its overrides; the directory's name.
        run_dir: absolute.
        arguments: of `regrow`, which train it.
        steps: `train.steps`.
        checkpoint_folder: below `run_dir`, or a URL.
        ranks: how many it may have, the largest number first.
        gpu: whether its ranks use GPUs where there are some.
        cpus: that a rank takes.
        launcher: its kind, `slurm` or `local`; `here` for any other.
        resources: the launcher's fields, for submitting it again.
        working_dir: where the command was given.
        packages: the user's own that the command had.
        packages_folder: where those are that are not installed.
        jobs: Slurm's ids, the newest last.
    """

    name: str
    run_dir: str
    arguments: list[str]
    steps: int
    checkpoint_folder: str
    ranks: list[int]
    gpu: bool
    cpus: int
    launcher: str
    resources: dict[str, Any]
    working_dir: str
    jobs: list[str] = field(default_factory=list)
    packages: list[str] = field(default_factory=list)
    packages_folder: str = ""

    def environment(self) -> dict[str, str]:
        """What names the packages to the run's processes, whatever their working directory."""
        return UserPackages(tuple(self.packages), self.packages_folder).environment()


@dataclass(kw_only=True, slots=True)
class Sweep:
    """`sweep.json`.

    Attributes:
        folder: the sweep's directory, absolute.
        runs: by name.
    """

    folder: Path
    runs: dict[str, SweepRun] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / FILE

    def add(self, run: SweepRun) -> SweepRun:
        """Takes a run up, or what a new command says of one that is there; its jobs stay.

        Raises:
            UserError: another run lives in its directory.
        """
        for other in self.runs.values():
            if other.run_dir == run.run_dir and other.name != run.name:
                raise UserError(
                    f"the runs of a sweep must have directories of their own, but {run.name} and {other.name} share "
                    f"{run.run_dir}; leave hydra.sweep.subdir and run.name as they are"
                )
        known = self.runs.get(run.name)
        run.jobs = known.jobs if known else []
        self.runs[run.name] = run
        return run

    def save(self) -> None:
        """Replaces the file."""
        write_json(
            self.path,
            {"program": _PROGRAM, "format": _FORMAT, "runs": {n: asdict(r) for n, r in self.runs.items()}},
        )

    @classmethod
    def load(cls, folder: Path) -> "Sweep | None":
        """Reads the file; None where there is no sweep.

        Raises:
            UserError: another program's, or another version's.
        """
        try:
            body = read_json(folder / FILE)
        except FileNotFoundError:
            return None
        except ValueError:
            body = None
        if not isinstance(body, dict) or body.get("program") != _PROGRAM:
            raise UserError(
                f"run.root must be a directory of regrow's own sweeps, but {folder / FILE} is another program's; "
                "choose another run.root"
            )
        if body.get("format") != _FORMAT:
            raise UserError(
                f"{folder / FILE} must have format {_FORMAT}, but has {body.get('format')}; upgrade regrow"
            )
        return cls(folder=folder, runs={n: SweepRun(**r) for n, r in body["runs"].items()})


@contextmanager
def open_sweep(folder: Path) -> Iterator[Sweep]:
    """The sweep, changed by nobody else meanwhile, and saved when the block ends well."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".sweep.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sweep = Sweep.load(folder) or Sweep(folder=folder)
        yield sweep
        sweep.save()


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStatus:
    """What a run has come to.

    Attributes:
        name: the run's.
        state: `running`, `waiting`, `requeued`, `not started` or one of `FINAL`.
        step: reached.
        steps: to reach.
        loss: the last one.
        val_loss: the last one.
        attempts: starts that began to train.
        node: where it runs, or ran last.
        job: the newest id.
        lost_s: seconds between a stop and the next start, over all of them.
        checkpoints: complete steps on the disk; for a URL the newest that was committed.
        fields: what tells the run from the others of its sweep, see `regrow.launch.sweep.members`.
        last: the last value of every measure.
    """

    name: str
    state: str
    step: int
    steps: int
    loss: float | None
    val_loss: float | None
    attempts: int
    node: str
    job: str
    lost_s: float
    checkpoints: list[int]
    fields: dict[str, Any] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)


def inspect_run(run: SweepRun, jobs: Mapping[str, Job] | None) -> RunStatus:
    """Looks at a run's directory and at the queue.

    Args:
        run: of a sweep.
        jobs: the queue; None where there is none.
    """
    folder = Path(run.run_dir)
    record = _record(folder)
    columns = read_columns(folder / METRICS)
    beside = read_evaluations(folder / EVALUATIONS, record.lineages if record else [])
    last = {name: values[-1] for name, (_, values) in {**beside, **columns.curves}.items()}
    history = list(read_rows(folder / _HISTORY))
    job = next((jobs[i] for i in reversed(run.jobs) if i in jobs), None) if jobs else None
    node = (job.nodes if job else "") or (history[-1]["node"] if history else "")
    if not node and record is not None and record.attempts:
        node = record.attempts[-1].host
    return RunStatus(
        name=run.name,
        state=_state(run, record, history, job, in_queue=jobs is not None),
        step=columns.steps[-1] if columns.steps else 0,
        steps=run.steps,
        loss=last.get("loss"),
        val_loss=last.get("val_loss"),
        attempts=len(record.attempts) if record else 0,
        node=node,
        job=run.jobs[-1] if run.jobs else "",
        lost_s=_lost(history),
        checkpoints=_checkpoints(folder, run.checkpoint_folder, record),
        last=last,
    )


def _record(folder: Path) -> RunRecord | None:
    try:
        return RunRecord.load(folder)
    except ValueError:
        return None


def _state(
    run: SweepRun, record: RunRecord | None, history: Sequence[Mapping[str, Any]], job: Job | None, *, in_queue: bool
) -> str:
    if job is not None and job.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"):
        return "requeued" if any(h["job"] == job.id for h in history) else "waiting"
    last = record.attempts[-1] if record and record.attempts else None
    if last is not None and last.end == "finished" and last.to_step >= run.steps:
        return "finished"
    if job is not None and job.state != "COMPLETING":
        return "running" if job.state in ("RUNNING", "CONFIGURING") else job.state.lower()
    if job is not None:
        return "ending"
    own = [h for h in history if not run.jobs or h["job"] == run.jobs[-1]]
    if own and own[-1]["event"] in _EVENTS:
        return _EVENTS[own[-1]["event"]]
    if last is None:
        return "lost" if run.jobs and in_queue else "not started"
    if last.end is None and run.launcher == "slurm":
        return "lost" if in_queue else "unknown"
    if record is not None and (last.end is None or run.launcher != "slurm"):
        # Nobody but the run itself says that it is running; it may have been started again.
        status = run_status(record, _lease_of(run))
        if last.end is None or status == "running":
            return status
    return {"failed": "failed", "finished": "not started"}.get(last.end or "", "stopped")


def _lease_of(run: SweepRun) -> Storage:
    if is_url(run.checkpoint_folder):
        return open_storage(f"{run.checkpoint_folder.rstrip('/')}/{run.name}")
    place = Path(run.run_dir, run.checkpoint_folder)
    # A run that saves nothing keeps its lease in its own directory.
    return open_storage(place if place.is_dir() else Path(run.run_dir))


def _lost(history: Sequence[Mapping[str, Any]]) -> float:
    """Time between the end of a start, where it is known, and the next start."""
    lost = 0.0
    for before, after in pairwise(history):
        if after["event"] == "start" and before["event"] != "start":
            lost += after["time"] - before["time"]
    return lost


def _checkpoints(run_dir: Path, where: str, record: RunRecord | None) -> list[int]:
    if "://" in where:
        newest = max((a.saved_step for a in record.attempts), default=0) if record else 0
        return [newest] if newest else []
    folder = run_dir / where
    steps = [parse_step_name(p.name) for p in folder.glob("step-*")] if folder.is_dir() else []
    return sorted(step for step in steps if step is not None)


def result_of(run_dir: Path) -> float | None:
    """A run's result: its last validation loss, or without validation its last loss.

    None before the first step, and where the run has just been refused because its rows cannot be read.
    """
    try:
        rows = list(read_rows(run_dir / METRICS))
    except OSError:
        return None
    found = next((r["val_loss"] for r in reversed(rows) if "val_loss" in r), rows[-1]["loss"] if rows else None)
    return None if found is None else float(found)


def run_name_override(name: str) -> str:
    """`run.name=…`, quoted as Hydra's grammar wants it."""
    escaped = name.replace("\\", "\\\\").replace("'", "\\'")
    return f"run.name='{escaped}'"
