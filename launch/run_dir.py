"""Opening a run's directory: whose it is, whether the command fits it, and which lineage the command means."""

import dataclasses
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf

from checkpoint.catalog import Catalog, Entry
from checkpoint.files import fsync_folder, fsync_path
from checkpoint.lease import LeaseHeldError, Ticket, acquire_lease, forget_lease
from checkpoint.lineage import (
    Lineage,
    LoadRequest,
    Resume,
    StartKind,
    StartPoint,
    choose_lineage,
    start_point,
)
from checkpoint.storage.base import Storage
from checkpoint.storage.local import LocalStorage
from launch.build import checkpoint_folder, export_folder
from launch.errors import UserError
from launch.extension import say_where_it_stands, settle_schedule
from launch.identity import Difference, compare
from launch.preflight import check_initial_load
from launch.schema import Config
from trainer.data.token_store import TokenStore
from trainer.hooks.export import exported_steps
from trainer.hooks.metrics import METRICS, SAMPLES
from trainer.run_record import FILE, RunRecord, new_id

__all__ = ["open_run", "own_run", "share_run"]

log = logging.getLogger(__name__)

CONFIG = "config.yaml"
_RANKS_LOCK = ".ranks.lock"
_WAIT_S = 8.0


def _lease_place(config: Config, run_dir: Path) -> Storage:
    """Beside the bytes that the lease protects."""
    return checkpoint_folder(config, run_dir) if config.checkpoint.enable else LocalStorage(run_dir)


@contextmanager
def own_run(config: Config, run_dir: Path) -> Iterator[Ticket]:
    """Keeps every other launcher out of the run by the lease in its checkpoint folder.

    A dead launcher's ranks, which end with it, are waited for.

    Raises:
        UserError: another process holds the run.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    place = _lease_place(config, run_dir)
    try:
        lease = acquire_lease(place, config.checkpoint.lease_timeout_s, str(run_dir), on_lost=_stop_at_once)
    except LeaseHeldError as error:
        raise UserError(str(error)) from error
    try:
        _await_ranks(run_dir)
        yield lease.ticket
    finally:
        lease.release()
        if not (run_dir / FILE).exists():
            _leave_unused(config, run_dir, place)


def _stop_at_once() -> None:
    """Another launcher owns the run: nothing of this one may write into it any more. Its ranks die with it."""
    logging.shutdown()
    os._exit(1)


def _leave_unused(config: Config, run_dir: Path, place: Storage) -> None:
    """Removes what owning it left in the folder of a run that was refused before it began."""
    (run_dir / _RANKS_LOCK).unlink(missing_ok=True)
    forget_lease(place)
    for folder in (run_dir / config.checkpoint.folder, run_dir):
        with suppress(OSError):
            folder.rmdir()


def _await_ranks(run_dir: Path) -> None:
    """Waits a little for a dead launcher's ranks on this host; stopped ones can commit nothing any more."""
    deadline = time.monotonic() + _WAIT_S
    with (run_dir / _RANKS_LOCK).open("a+") as ranks:
        while time.monotonic() < deadline:
            with suppress(BlockingIOError):
                _lock(ranks, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _lock(ranks, fcntl.LOCK_UN)
                return
            time.sleep(0.05)
    log.warning("ranks of an earlier start of %s are still there; they can save nothing any more", run_dir)


def _lock(file: IO[str], operation: int) -> None:
    """Locks a file where its file system has locks: they only spare a wait, and the lease decides."""
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:
        raise
    except OSError as error:
        log.info("%s cannot be locked (%s); going on without", file.name, error.strerror)


@contextmanager
def share_run(run_dir: Path) -> Iterator[None]:
    """Held by each rank, so that a later launcher can tell when the last one is gone."""
    with (run_dir / _RANKS_LOCK).open("a+") as ranks:
        _lock(ranks, fcntl.LOCK_SH)
        yield


def open_run(
    config: Config,
    settings: dict[str, Any],
    run_dir: Path,
    store: TokenStore,
    *,
    overrides: Sequence[str],
) -> int | None:
    """Compares the command with what is stored, chooses the lineage, and writes `run.json`.

    Args:
        config: typed.
        settings: the same as plain values.
        run_dir: the run's directory.
        store: the corpus.
        overrides: the command line, for `.hydra/`.

    Returns:
        The step at which the run has come to its end already; None where there is something to do.

    Raises:
        UserError: the run is another one than the command describes.
        CheckpointError: what should be resumed is not there.
    """
    record = RunRecord.load(run_dir)
    changes: list[Difference] = []
    if record is not None:
        changes = _check_same(config, settings, run_dir, store, record)
    record = record or RunRecord(data_fingerprint=store.index.fingerprint)
    catalog = Catalog(checkpoint_folder(config, run_dir))
    entries = catalog.entries(record.lineages)
    if not config.checkpoint.enable and entries:
        raise UserError(
            f"checkpoint.enable must not be false for a run that has checkpoints, but {catalog.folder.url} holds "
            f"step {entries[-1].step}; choose another run.name or leave checkpoint.enable true"
        )
    again = _is_restart(os.environ)
    lineage = choose_lineage(
        record.lineages,
        LoadRequest.from_config(config.checkpoint),
        steps=[e.step for e in entries if e.resumable],
        # Both act once a launch, not once a restart or requeue of it.
        resume=Resume.auto if again and config.run.resume is Resume.never else config.run.resume,
        rewind=config.run.rewind and not again,
        new_id=_lineage_id(record.lineages),
        folder=catalog.folder.url,
    )
    if lineage is not None:
        lineage = _from_weights(config, lineage)
        if record.lineages:
            _keep_rows(run_dir, record.lineages[-1])
        record.lineages.append(lineage)
        entries = catalog.entries(record.lineages)
    start = start_point(record.lineages, [(e.step, e.manifest.lineage) for e in entries if e.resumable])
    if _is_finished(config, record, entries, run_dir):
        _write_config(settings, run_dir, store, overrides)
        record.save(run_dir)
        reached = max([record.attempts[-1].to_step, *(e.step for e in entries)])
        say_where_it_stands(config, reached, entries)
        return reached
    _check_start(config, start, record, catalog.folder.url)
    _check_weights(start, record, entries, run_dir)
    settle_schedule(config, record, start, entries)
    say_where_it_stands(config, start.step, entries)
    for change in changes:
        log.warning("%s, from step %d on", change, start.step)
        record.changes.append(
            {"name": change.name, "from": change.stored, "to": change.given, "after_step": start.step}
        )
    _write_config(settings, run_dir, store, overrides)
    record.save(run_dir)
    return None


def _from_weights(config: Config, lineage: Lineage) -> Lineage:
    """With `model.load_weights` a line that would begin with fresh weights begins with the model's folder."""
    if (
        lineage.origin is not StartKind.fresh
        or not config.model.load_weights
        or config.checkpoint.create_seed_checkpoint
    ):
        return lineage
    request = dataclasses.replace(
        lineage.request, initial_load_path=config.model.hf_assets_path, initial_load_in_hf=True
    )
    return dataclasses.replace(lineage, origin=StartKind.initial, request=request)


def _is_restart(environ: Mapping[str, str]) -> bool:
    """Whether torchrun or Slurm starts the same launch again."""
    return any(environ.get(n) not in (None, "", "0") for n in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def _check_start(config: Config, start: StartPoint, record: RunRecord, folder: str) -> None:
    """Refuses a start that cannot work, or that would lose what was trained."""
    if start.kind is StartKind.initial:
        for line in check_initial_load(config, start).lines():
            log.warning("initial load from %s: %s", start.path, line)
    saved = max((a.saved_step for a in record.attempts if a.lineage == record.lineages[-1].id), default=0)
    if start.kind is not StartKind.step and saved > 0 and config.checkpoint.enable:
        raise UserError(
            f"checkpoint.folder must hold the run's steps, the newest of them {saved}, but {folder} has none; "
            "restore them, or use run.resume=never to start afresh"
        )


def _check_weights(start: StartPoint, record: RunRecord, entries: Sequence[Entry], run_dir: Path) -> None:
    """Refuses to go on where the weights were saved and nothing else.

    Raises:
        UserError: that is so.
    """
    saved = [e.step for e in entries if not e.resumable]
    current = [a for a in record.attempts if a.lineage == record.lineages[-1].id]
    exported = exported_steps(export_folder(run_dir)) if any(a.end == "finished" for a in current) else []
    if start.kind is StartKind.step or not (saved or exported):
        return
    what = f"the weights of step {saved[-1]}" if saved else f"the Hugging Face folder of step {exported[-1]}"
    raise UserError(
        f"train.steps must not be raised where no full checkpoint was kept, but {run_dir} has {what} alone; start "
        "another run with checkpoint.initial_load_path, or use run.resume=never"
    )


def _lineage_id(lineages: Sequence[Lineage]) -> str:
    return f"{len(lineages)}-{new_id()[:4]}"


def _check_same(
    config: Config, settings: dict[str, Any], run_dir: Path, store: TokenStore, record: RunRecord
) -> list[Difference]:
    """The allowed changes; raises UserError for the others."""
    if not (run_dir / CONFIG).exists():
        raise UserError(
            f"the run {run_dir} must have its {CONFIG} to be continued, but has not; restore it (from "
            ".hydra/config.yaml) or choose another run.name"
        )
    stored = OmegaConf.to_container(OmegaConf.load(run_dir / CONFIG))
    assert isinstance(stored, dict)
    identity, hyperparameters = compare({str(k): v for k, v in stored.items()}, settings)
    if identity:
        more = f" ({len(identity) - 1} more: {', '.join(d.name for d in identity[1:])})" if identity[1:] else ""
        raise UserError(
            f"the run {run_dir} must keep its model, data and seed, but {identity[0]}{more}; choose another "
            "run.name, or the stored values"
        )
    if record.data_fingerprint and record.data_fingerprint != store.index.fingerprint:
        raise UserError(
            f"the run {run_dir} must keep its data and tokenizer, but the corpus' fingerprint is "
            f"{store.index.fingerprint} and the run's is {record.data_fingerprint}; restore the files or choose "
            "another run.name"
        )
    refused = [d for d in hyperparameters if d.name not in config.run.allow_change]
    if refused:
        names = ",".join(d.name for d in refused)
        raise UserError(
            f"the run {run_dir} must keep its hyperparameters, but {refused[0]}; add "
            f"run.allow_change=[{names}] to change them from here on, or choose another run.name"
        )
    return hyperparameters


def _keep_rows(run_dir: Path, lineage: Lineage) -> None:
    """Copies the logs of a lineage that is about to be set aside; safe to repeat."""
    target = run_dir / "lineages" / lineage.id
    target.mkdir(parents=True, exist_ok=True)
    for name in (METRICS, SAMPLES):
        if (run_dir / name).exists():
            shutil.copyfile(run_dir / name, target / f"{name}.tmp")
            (target / f"{name}.tmp").rename(target / name)


def _write_config(settings: dict[str, Any], run_dir: Path, store: TokenStore, overrides: Sequence[str]) -> None:
    """The accepted config, the overrides as Hydra writes them, and the tokenizer."""
    tokenizer = run_dir / "tokenizer.json"
    if not tokenizer.exists():
        shutil.copyfile(store.tokenizer_file, tokenizer)
    hydra_folder = run_dir / ".hydra"
    hydra_folder.mkdir(exist_ok=True)
    for path, value in (
        (hydra_folder / "overrides.yaml", list(overrides)),
        (hydra_folder / "config.yaml", settings),
        (run_dir / CONFIG, settings),
    ):
        temporary = path.with_name(f".{path.name}.tmp")
        OmegaConf.save(OmegaConf.create(value), temporary)
        fsync_path(temporary)
        temporary.rename(path)
    fsync_folder(run_dir)


def _is_finished(config: Config, record: RunRecord, entries: Sequence[Entry], run_dir: Path) -> bool:
    """Whether the newest lineage has come to its end, so that there is nothing to do."""
    if not record.attempts:
        return False
    steps, last = config.train.steps, record.attempts[-1]
    if config.checkpoint.enable and not config.checkpoint.load_only:
        # A last save in Hugging Face's format is no checkpoint, but is the run's end all the same.
        saved = max([e.step for e in entries] + exported_steps(export_folder(run_dir)), default=0)
        if saved < steps or (
            config.checkpoint.last_save_in_hf and steps not in exported_steps(export_folder(run_dir))
        ):
            return False
    return last.lineage == record.lineages[-1].id and last.end == "finished" and last.to_step >= steps
