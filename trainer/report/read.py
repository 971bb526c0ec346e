"""Reading a run's directory for a report. No torch: whoever writes the page need not wait for it."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from regrow.checkpoint.errors import CheckpointError
from regrow.checkpoint.files import read_regular
from regrow.checkpoint.format.manifest import MANIFEST, read_manifest
from regrow.checkpoint.format.step_name import ASIDE, parse_leftover, parse_set_aside, parse_step_name
from regrow.checkpoint.storage.local import LocalStorage
from regrow.checkpoint.storage.opening import is_url
from regrow.trainer.report.columns import Columns, read_columns, read_evaluations
from regrow.trainer.report.flops import flops_per_token
from regrow.trainer.report.life import DiskStep, Life, life_of_run
from regrow.trainer.report.log_events import read_log
from regrow.trainer.run_files import CONFIG, EVALUATIONS, METRICS, RECORD
from regrow.trainer.run_folders import run_status
from regrow.trainer.run_record import RunRecord, RunRecordError

__all__ = ["LOG", "RunReport", "read_config", "read_overrides", "read_run"]

LOG = "logs/rank-0.log"
_CONFIG_BYTES = 64 << 20
# Manifests that are read for who wrote a step; a run that keeps more has its newest ones described.
_MANIFESTS = 12
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunReport:
    """What a page says of a run.

    Attributes:
        name: its path below the folder that was asked for.
        status: see `regrow.trainer.run_folders.run_status`, or `damaged`.
        config: that it was accepted with, as plain values; empty where it cannot be read.
        overrides: of its last command.
        columns: its measures.
        life: its history; None where its record cannot be read.
        flops_per_token: None for a model of another kind.
    """

    name: str
    status: str
    config: dict[str, Any]
    overrides: list[str]
    columns: Columns
    life: Life | None
    flops_per_token: float | None


def read_config(run_dir: Path) -> dict[str, Any]:
    """The config that a run was accepted with; empty where it cannot be read."""
    found = _read_yaml(run_dir / CONFIG)
    return {str(k): v for k, v in found.items()} if isinstance(found, dict) else {}


def read_overrides(run_dir: Path) -> list[str]:
    """The overrides of a run's last command; none where they cannot be read."""
    found = _read_yaml(run_dir / ".hydra/overrides.yaml")
    return [o for o in found if isinstance(o, str)] if isinstance(found, list) else []


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.load(read_regular(path, _CONFIG_BYTES), Loader=_LOADER)
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        return None


def read_run(run_dir: Path, name: str) -> RunReport:
    """A run as its files tell it; what cannot be read is left out, and never the reason that there is no page.

    Args:
        run_dir: the run's directory.
        name: for the page.
    """
    config = read_config(run_dir)
    record = _record(run_dir)
    columns = _columns(run_dir, record)
    if record is None:
        status, life = "damaged" if (run_dir / RECORD).exists() else "unknown", None
    else:
        folder = _checkpoint_folder(run_dir, config)
        status = "unknown" if folder is None else run_status(record, LocalStorage(folder))
        last = record.attempts[-1].end if record.attempts else None
        if folder is None and last is not None:
            status = last if last in ("finished", "failed") else "stopped"
        disk = [] if folder is None else list(_disk_steps(folder))
        life = life_of_run(record, read_log(run_dir / LOG), disk, status, _step_seconds(columns))
    return RunReport(
        name=name,
        status=status,
        config=config,
        overrides=read_overrides(run_dir),
        columns=columns,
        life=life,
        flops_per_token=flops_per_token(config),
    )


def _record(run_dir: Path) -> RunRecord | None:
    try:
        return RunRecord.load(run_dir)
    except RunRecordError:
        return None


def _columns(run_dir: Path, record: RunRecord | None) -> Columns:
    try:
        columns = read_columns(run_dir / METRICS)
    except OSError:
        columns = Columns(steps=[], tokens=[], seconds=[], curves={})
    try:
        beside = read_evaluations(run_dir / EVALUATIONS, record.lineages if record else [])
    except OSError:
        beside = {}
    for curve, (steps, values) in beside.items():
        # What the run measured itself stands in its rows.
        columns.curves.setdefault(curve, (steps, values))
    return columns


def _step_seconds(columns: Columns) -> float:
    _, took = columns.curves.get("step_time_s", ([], []))
    return statistics.median(took) if took else 0.0


def _checkpoint_folder(run_dir: Path, config: dict[str, Any]) -> Path | None:
    """Where steps and the lease lie; None for an object store, which no page waits for."""
    checkpoint = config.get("checkpoint")
    if not isinstance(checkpoint, dict) or not checkpoint.get("enable", True):
        return run_dir
    folder = str(checkpoint.get("folder", "checkpoint"))
    return None if is_url(folder) else run_dir / folder


def _disk_steps(folder: Path) -> Iterable[DiskStep]:
    """What lies in a checkpoint folder, ascending."""
    try:
        names = [p.name for p in folder.iterdir()]
        aside = [p.name for p in (folder / ASIDE).glob("*/*")]
    except OSError:
        return
    steps = sorted(step for step in map(parse_step_name, names) if step is not None)
    for step in steps:
        yield _disk_step(folder / f"step-{step}", step, described=step in steps[-_MANIFESTS:])
    for state, found in (("incomplete", map(parse_leftover, names)), ("set aside", map(parse_set_aside, aside))):
        yield from (DiskStep(step=step, state=state) for step in sorted({s for s in found if s is not None}))


def _disk_step(place: Path, step: int, *, described: bool) -> DiskStep:
    try:
        at = (place / MANIFEST).stat().st_mtime
        manifest = read_manifest(place, check_files=False) if described else None
    except (OSError, CheckpointError):
        return DiskStep(step=step, state="damaged")
    if manifest is None:
        return DiskStep(step=step, state="kept", at=at)
    return DiskStep(step=step, state="kept", lineage=manifest.lineage, ranks=manifest.ranks, at=at)
