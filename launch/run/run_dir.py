"""Opening a run's directory: whose it is, whether the command fits it, and which lineage the command means."""

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from regrow.checkpoint.format.manifest import MANIFEST
from regrow.checkpoint.format.stored_step import StoredStep
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
from regrow.checkpoint.run.catalog import Catalog
from regrow.launch.config.errors import UserError
from regrow.launch.config.identity import Difference, compare, is_allowed
from regrow.launch.config.later_fields import later_defaults
from regrow.launch.config.schema import Config
from regrow.launch.run.build import checkpoint_folder, export_folder
from regrow.launch.run.extension import say_where_it_stands, settle_schedule
from regrow.launch.run.lost_record import check_owner, newest_of, rebuild_record
from regrow.launch.run.preflight import check_initial_load
from regrow.launch.run.run_documents import begin_run, is_pending, note_pending, stored_config
from regrow.trainer.data.corpus import Corpus
from regrow.trainer.export_folder import exported_steps
from regrow.trainer.jsonlines import read_rows
from regrow.trainer.run_files import CONFIG, METRICS
from regrow.trainer.run_record import RunRecord, new_id

__all__ = ["OpenedRun", "open_run"]

log = logging.getLogger(__name__)


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
    corpus: Corpus,
    *,
    overrides: Sequence[str],
) -> OpenedRun:
    """Compares the command with what is stored, and chooses the lineage; the run stays as it is until `begin_run`.

    Args:
        config: typed.
        config_dict: the same as plain values.
        run_dir: the run's directory.
        corpus: of the command.
        overrides: the command line, for `.hydra/`.

    Raises:
        UserError: the run is another one than the command describes.
        CheckpointError: what should be resumed is not there.
    """
    catalog = Catalog(checkpoint_folder(config, run_dir))
    complete, damaged = catalog.scan()
    record, stored = _what_was_recorded(config, config_dict, run_dir, corpus, catalog, complete)
    if record is None and config.run.resume is not Resume.never:
        _check_nothing_lost(config, run_dir, catalog, complete, damaged)
    changes: list[Difference] = []
    if record is not None:
        check_owner(record, complete, run_dir, catalog.folder.url)
        changes = _check_same(config, config_dict, run_dir, corpus, record, stored)
    record = record or RunRecord(data_fingerprint=corpus.fingerprint)
    entries = [e for e in complete if is_visible(record.lineages, e.step, e.manifest.lineage)]
    if not config.checkpoint.enable and entries:
        raise UserError(
            f"checkpoint.enable must not be false for a run that has checkpoints, but {catalog.folder.url} holds "
            f"step {entries[-1].step}; choose another run.name or leave checkpoint.enable true"
        )
    again = _is_restart(os.environ) and not is_pending(run_dir, os.environ)
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
        begin_run(config_dict, run_dir, corpus, overrides, record)
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
        note_pending(run_dir, os.environ)
    return OpenedRun(record=record, reached=None)


def _what_was_recorded(
    config: Config,
    config_dict: dict[str, Any],
    run_dir: Path,
    corpus: Corpus,
    catalog: Catalog,
    complete: Sequence[StoredStep],
) -> tuple[RunRecord | None, dict[str, Any] | None]:
    """The run's record and config: as they lie in its folder, else as its steps tell; None where it is a new run."""
    record = RunRecord.load(run_dir)
    stored = stored_config(run_dir, record, complete)
    if record is not None or not config.checkpoint.enable:
        return record, stored
    record = rebuild_record(complete, config, config_dict, corpus.fingerprint, catalog.folder.url)
    if record is None:
        return None, stored
    newest = newest_of(complete)
    new = "" if newest.manifest.run_id else ", whose format does not tell the run's id: it is a new one"
    log.warning("%s has no run.json: it is made anew from step %d%s", run_dir, newest.step, new)
    return record, newest.manifest.config or config_dict


def _check_nothing_lost(
    config: Config, run_dir: Path, catalog: Catalog, complete: Sequence[StoredStep], damaged: Mapping[int, str]
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


def _check_weights(start: StartPoint, record: RunRecord, entries: Sequence[StoredStep], run_dir: Path) -> None:
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
    corpus: Corpus,
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
    if record.data_fingerprint and record.data_fingerprint != corpus.fingerprint:
        raise UserError(
            f"the run {run_dir} must keep its data and tokenizer, but the corpus' fingerprint is "
            f"{corpus.fingerprint} and the run's is {record.data_fingerprint}; restore the files or choose "
            "another run.name"
        )
    refused = [d for d in hyperparameters if not is_allowed(d.name, config.run.allow_change)]
    if refused:
        names = ",".join(d.name for d in refused)
        raise UserError(
            f"the run {run_dir} must keep its hyperparameters, but {refused[0]}; add "
            f"run.allow_change=[{names}] to change them from here on, or choose another run.name"
        )
    return hyperparameters


def _is_finished(config: Config, record: RunRecord, entries: Sequence[StoredStep], run_dir: Path) -> bool:
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
