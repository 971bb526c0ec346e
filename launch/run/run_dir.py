"""Opening a run's directory: whose it is, whether the command fits it, and which lineage the command means."""

import dataclasses
import fcntl
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from regrow.checkpoint.documents import DocumentError, parse_json
from regrow.checkpoint.errors import CheckpointError
from regrow.checkpoint.files import fsync_folder, fsync_path, naming, read_regular, write_json
from regrow.checkpoint.format.manifest import MANIFEST
from regrow.checkpoint.policy.lineage import (
    Lineage,
    LoadRequest,
    Resume,
    StartKind,
    StartPoint,
    choose_lineage,
    is_visible,
    start_point,
)
from regrow.checkpoint.run.catalog import Catalog, Entry
from regrow.checkpoint.run.lease import FencingToken, LeaseLostError, acquire_lease
from regrow.checkpoint.scratch import clear_dead_scratch
from regrow.checkpoint.storage.base import Storage
from regrow.checkpoint.storage.local import LocalStorage
from regrow.launch.config.errors import UserError
from regrow.launch.config.identity import Difference, compare
from regrow.launch.config.later_fields import later_defaults
from regrow.launch.config.schema import Config
from regrow.launch.run.build import checkpoint_folder, export_folder
from regrow.launch.run.extension import say_where_it_stands, settle_schedule
from regrow.launch.run.lost_record import check_owner, newest_of, rebuild_record
from regrow.launch.run.preflight import check_initial_load
from regrow.trainer.data.token_store import TokenStore
from regrow.trainer.hooks.export import exported_steps
from regrow.trainer.hooks.metrics import METRICS, SAMPLES
from regrow.trainer.jsonlines import read_rows
from regrow.trainer.run_record import FILE, RunRecord, new_id

__all__ = ["begin_run", "lease_place", "open_run", "own_run", "share_run"]

log = logging.getLogger(__name__)

CONFIG = "config.yaml"
_GONE = "is gone"
_RANKS_LOCK = ".ranks.lock"
# A document of the run before its rename: only the launcher and rank 0 write these, and only while they own the run.
_TEMPORARY = re.compile(
    r"\.((run|stop|tokenizer|kernels|pending-start)\.json|\.pending-start\.json|(config|overrides)\.yaml"
    r"|(metrics|samples)\.jsonl)(\.[0-9a-f-]+)*\.tmp|\.probe-[0-9]+|failed-rank-[0-9]+\.tmp"
)
# Of a start that has chosen a lineage and whose ranks have not loaded yet.
_PENDING = ".pending-start.json"
_WAIT_S = 8.0


def lease_place(config: Config, run_dir: Path) -> Storage:
    """Beside the bytes that the lease protects."""
    return checkpoint_folder(config, run_dir) if config.checkpoint.enable else LocalStorage(run_dir)


@contextmanager
def own_run(config: Config, run_dir: Path) -> Iterator[FencingToken]:
    """Keeps every other launcher out of the run by the lease in its checkpoint folder.

    A dead launcher's ranks, which end with it, are waited for.

    Raises:
        UserError: another process holds the run.
    """
    setting = "checkpoint.folder" if config.checkpoint.enable else "run.root"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lease = acquire_lease(
            lease_place(config, run_dir),
            config.checkpoint.lease_timeout_s,
            str(run_dir),
            on_lost=_stop_at_once,
            setting=setting,
        )
    except CheckpointError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(
            f"run.root must be a folder that can be written, but {error.filename or run_dir} cannot "
            f"({error.strerror or error}); choose another one"
        ) from error
    try:
        _await_ranks(run_dir)
        _clear_leftovers(run_dir)
        yield lease.ticket
    finally:
        if _is_begun(run_dir):
            lease.release()
        elif lease.withdraw():
            _leave_unused(config, run_dir)


def _is_begun(run_dir: Path) -> bool:
    try:
        return (run_dir / FILE).exists()
    except OSError:
        return True


def _stop_at_once() -> None:
    """Another launcher owns the run: nothing of this one may write into it any more. Its ranks die with it."""
    logging.shutdown()
    os._exit(1)


def _leave_unused(config: Config, run_dir: Path) -> None:
    """Removes what owning it left in the folder of a run that was refused before it began."""
    with suppress(OSError):
        (run_dir / _RANKS_LOCK).unlink(missing_ok=True)
    for folder in (run_dir / config.checkpoint.folder, run_dir):
        with suppress(OSError):
            folder.rmdir()


def _clear_leftovers(run_dir: Path) -> None:
    """Removes what killed processes left: of this run, and in the places that all programs share."""
    for line in clear_dead_scratch():
        log.info("%s", line)
    for folder in (run_dir, run_dir / ".hydra", run_dir / "logs", *(run_dir / "lineages").glob("*")):
        with suppress(OSError):
            for path in folder.iterdir():
                if _TEMPORARY.fullmatch(path.name) or path.match("lineages/*/*.jsonl.tmp"):
                    path.unlink()
                    log.info("removed %s, which a killed process left", path)


def _await_ranks(run_dir: Path) -> None:
    """Waits a little for a dead launcher's ranks on this host; stopped ones can commit nothing any more."""
    deadline = time.monotonic() + _WAIT_S
    with _ranks_lock(run_dir) as ranks:
        while ranks is not None and time.monotonic() < deadline:
            with suppress(BlockingIOError):
                _lock(ranks, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _lock(ranks, fcntl.LOCK_UN)
                return
            time.sleep(0.05)
    if ranks is not None:
        log.warning("ranks of an earlier start of %s are still there; they can save nothing any more", run_dir)


@contextmanager
def _ranks_lock(run_dir: Path) -> Iterator[int | None]:
    """The file by which ranks are waited for; None where it cannot be opened: it only spares a wait."""
    path = run_dir / _RANKS_LOCK
    try:
        # A named pipe in its place keeps nobody waiting.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    except OSError as error:
        log.info("%s cannot be opened (%s); continuing without a lock", path, error.strerror)
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int, operation: int) -> None:
    """Locks a file where its file system has locks: they only spare a wait, and the lease decides who may write."""
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        raise
    except OSError as error:
        log.info("%s cannot be locked (%s); continuing without a lock", _RANKS_LOCK, error.strerror)


@contextmanager
def share_run(run_dir: Path) -> Iterator[None]:
    """Held by each rank, so that a later launcher can tell when the last one is gone."""
    with _ranks_lock(run_dir) as ranks:
        if ranks is not None:
            _lock(ranks, fcntl.LOCK_SH)
        yield


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OpenedRun:
    """A run that the command fits.

    Attributes:
        record: as this start makes it; written by `begin_run`, once the state is loaded.
        reached: the step at which the run has come to its end already, its record is then written; None where there
            is something to do.
    """

    record: RunRecord
    reached: int | None


def open_run(
    config: Config,
    config_dict: dict[str, Any],
    run_dir: Path,
    store: TokenStore,
    *,
    overrides: Sequence[str],
) -> OpenedRun:
    """Compares the command with what is stored, and chooses the lineage; the run stays as it is until `begin_run`.

    Args:
        config: typed.
        config_dict: the same as plain values.
        run_dir: the run's directory.
        store: the corpus.
        overrides: the command line, for `.hydra/`.

    Raises:
        UserError: the run is another one than the command describes.
        CheckpointError: what should be resumed is not there.
    """
    catalog = Catalog(checkpoint_folder(config, run_dir))
    complete, damaged = catalog.scan()
    record, stored = _what_was_recorded(config, config_dict, run_dir, store, catalog, complete)
    if record is None and config.run.resume is not Resume.never:
        _check_nothing_lost(config, run_dir, catalog, complete, damaged)
    changes: list[Difference] = []
    if record is not None:
        check_owner(record, complete, run_dir, catalog.folder.url)
        changes = _check_same(config, config_dict, run_dir, store, record, stored)
    record = record or RunRecord(data_fingerprint=store.index.fingerprint)
    entries = [e for e in complete if is_visible(record.lineages, e.step, e.manifest.lineage)]
    if not config.checkpoint.enable and entries:
        raise UserError(
            f"checkpoint.enable must not be false for a run that has checkpoints, but {catalog.folder.url} holds "
            f"step {entries[-1].step}; choose another run.name or leave checkpoint.enable true"
        )
    again = _is_restart(os.environ) and not _is_pending(run_dir, os.environ)
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
        record.lineages.append(lineage)
        entries = [e for e in complete if is_visible(record.lineages, e.step, e.manifest.lineage)]
    start = start_point(record.lineages, [(e.step, e.manifest.lineage) for e in entries if e.resumable])
    if _is_finished(config, record, entries, run_dir):
        # No state is loaded after which the checkpoint folder would be tidied.
        for line in catalog.clear_leftovers():
            log.info("%s", line)
        begin_run(config_dict, run_dir, store, overrides, record)
        reached = max([record.attempts[-1].to_step, *(e.step for e in entries)])
        say_where_it_stands(config, reached, entries)
        return OpenedRun(record=record, reached=reached)
    _check_start(config, start, record, catalog.folder.url)
    _check_weights(start, record, entries, run_dir)
    settle_schedule(config, record, start, entries)
    say_where_it_stands(config, start.step, entries)
    for change in changes:
        log.warning("%s, from step %d on", change, start.step)
        record.changes.append(
            {"name": change.name, "from": change.stored, "to": change.given, "after_step": start.step}
        )
    if lineage is not None:
        _note_pending(run_dir, os.environ)
    return OpenedRun(record=record, reached=None)


def _what_was_recorded(
    config: Config,
    config_dict: dict[str, Any],
    run_dir: Path,
    store: TokenStore,
    catalog: Catalog,
    complete: Sequence[Entry],
) -> tuple[RunRecord | None, dict[str, Any] | None]:
    """The run's record and config: as they lie in its folder, else as its steps tell; None where it is a new run."""
    record = RunRecord.load(run_dir)
    stored = _stored_config(run_dir, record, complete)
    if record is not None or not config.checkpoint.enable:
        return record, stored
    record = rebuild_record(complete, config, config_dict, store.index.fingerprint, catalog.folder.url)
    if record is None:
        return None, stored
    newest = newest_of(complete)
    new = "" if newest.manifest.run_id else ", whose format does not tell the run's id: it is a new one"
    log.warning("%s has no run.json: it is made anew from step %d%s", run_dir, newest.step, new)
    return record, newest.manifest.config or config_dict


def _check_nothing_lost(
    config: Config, run_dir: Path, catalog: Catalog, complete: Sequence[Entry], damaged: Mapping[int, str]
) -> None:
    """Refuses to begin afresh where a run has been, of which neither a record nor a step tells.

    Raises:
        UserError: that is so.
    """
    steps = [f"step {e.step} is complete" for e in complete if not config.checkpoint.enable]
    # On an object store a step without its manifest is a first save that was cut short.
    steps += [why for step, why in damaged.items() if catalog.step_place(step).exists(MANIFEST)]
    rows = next(iter(read_rows(run_dir / METRICS)), None)
    if steps or rows is not None:
        found = steps[-1] if steps else f"{run_dir / METRICS} has rows"
        raise UserError(
            f"run.name must not name a run whose run.json is gone and that no step tells of, but {run_dir} is one "
            f"({found}); restore it, or use run.resume=never to start afresh"
        )


def _launch_of(environ: Mapping[str, str]) -> str:
    return environ.get("TORCHELASTIC_RUN_ID") or environ.get("SLURM_JOB_ID") or ""


def _note_pending(run_dir: Path, environ: Mapping[str, str]) -> None:
    """Says that this launch has chosen a lineage which is not recorded before the ranks have loaded.

    A restart before that must choose it again: `run.resume=never` and `run.rewind` act once a launch.
    """
    if _launch_of(environ):
        write_json(run_dir / _PENDING, {"launch": _launch_of(environ)})


def _is_pending(run_dir: Path, environ: Mapping[str, str]) -> bool:
    try:
        noted = parse_json(read_regular(run_dir / _PENDING, 1 << 16))
    except (OSError, DocumentError):
        return False
    return bool(_launch_of(environ)) and noted == {"launch": _launch_of(environ)}


def begin_run(
    config_dict: dict[str, Any], run_dir: Path, store: TokenStore, overrides: Sequence[str], record: RunRecord
) -> None:
    """Writes what a start changes in the run: its config, and last its record. Safe to repeat and to be killed in.

    Args:
        config_dict: the accepted config as plain values.
        run_dir: the run's directory.
        store: the corpus.
        overrides: the command line, for `.hydra/`.
        record: as the start makes it. Attempts that were added meanwhile (ranks started again) stay.
    """
    before = RunRecord.load(run_dir)
    if before is not None:
        known = [x.id for x in before.lineages]
        if [x.id for x in record.lineages][: len(known)] != known:
            raise LeaseLostError(f"another start has begun a line of steps in {run_dir}; this one must stop")
        record = dataclasses.replace(record, attempts=before.attempts, wandb_step=before.wandb_step)
        if before.lineages and before.lineages[-1].id != record.lineages[-1].id:
            _keep_rows(run_dir, before.lineages[-1])
    _write_config(config_dict, run_dir, store, overrides)
    record.save(run_dir)
    (run_dir / _PENDING).unlink(missing_ok=True)


def _stored_config(run_dir: Path, record: RunRecord | None, complete: Sequence[Entry]) -> dict[str, Any] | None:
    """The config that the run was accepted with; out of its newest step where the file is gone or damaged.

    Raises:
        UserError: the file is damaged, and no step tells.
    """
    if record is None:
        return None
    path = run_dir / CONFIG
    stored, problem = _read_config(path)
    if stored is not None:
        return stored
    tells = next((e for e in reversed(complete) if e.manifest.run_id == record.run_id and e.manifest.config), None)
    if tells is not None:
        log.warning("%s %s; the config that step %d was made with is taken", path, problem, tells.step)
        return tells.manifest.config
    if problem == _GONE:
        return None
    raise UserError(
        f"{path} must be the run's config, but {problem}; restore it from {run_dir / '.hydra/config.yaml'}"
    )


def _read_config(path: Path) -> tuple[dict[str, Any] | None, str]:
    """A stored config; where it cannot be read, None and what is wrong."""
    try:
        stored = OmegaConf.to_container(OmegaConf.create(read_regular(path).decode()))
    except FileNotFoundError:
        return None, _GONE
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, RecursionError, OSError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        reason = (error.strerror if isinstance(error, OSError) else None) or lines[0]
        return None, f"cannot be read ({reason})"
    if not isinstance(stored, dict) or "model" not in stored:
        return None, "holds none"
    return {str(k): v for k, v in stored.items()}, ""


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
    config: Config,
    config_dict: dict[str, Any],
    run_dir: Path,
    store: TokenStore,
    record: RunRecord,
    stored: dict[str, Any] | None,
) -> list[Difference]:
    """The allowed changes; raises UserError for the others."""
    if stored is None:
        raise UserError(
            f"the run {run_dir} must have its {CONFIG} to be continued, but has not; restore it (from "
            ".hydra/config.yaml) or choose another run.name"
        )
    identity, hyperparameters = compare(stored, config_dict, later_defaults(config))
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


def _write_config(config_dict: dict[str, Any], run_dir: Path, store: TokenStore, overrides: Sequence[str]) -> None:
    """The accepted config, the overrides as Hydra writes them, and the tokenizer."""
    tokenizer = run_dir / "tokenizer.json"
    body = store.tokenizer_file.read_bytes()
    if not _holds(tokenizer, body):
        # Also where a kill had left half of it.
        temporary = tokenizer.with_name(f".{tokenizer.name}.tmp")
        with naming(tokenizer):
            temporary.write_bytes(body)
            fsync_path(temporary)
        temporary.rename(tokenizer)
    hydra_folder = run_dir / ".hydra"
    hydra_folder.mkdir(exist_ok=True)
    for path, value in (
        (hydra_folder / "overrides.yaml", list(overrides)),
        (hydra_folder / "config.yaml", config_dict),
        (run_dir / CONFIG, config_dict),
    ):
        temporary = path.with_name(f".{path.name}.tmp")
        with naming(path):
            OmegaConf.save(OmegaConf.create(value), temporary)
            fsync_path(temporary)
        temporary.rename(path)
    with naming(run_dir):
        fsync_folder(run_dir)


def _holds(path: Path, body: bytes) -> bool:
    """Whether a file is there and has these bytes."""
    try:
        return read_regular(path, len(body)) == body
    except OSError:
        return False


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
