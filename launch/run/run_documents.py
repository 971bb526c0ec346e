"""What a start writes into a run's directory, and what a later one reads there."""

import dataclasses
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from regrow.checkpoint.documents import DocumentError, parse_json
from regrow.checkpoint.files import fsync_folder, fsync_path, naming, read_regular, write_json
from regrow.checkpoint.format.stored_step import StoredStep
from regrow.checkpoint.policy.lineage import Lineage
from regrow.checkpoint.run.lease import LeaseLostError
from regrow.launch.config.errors import UserError
from regrow.trainer.data.corpus import Corpus
from regrow.trainer.run_files import CONFIG, METRICS, SAMPLES
from regrow.trainer.run_record import RunRecord

__all__ = ["begin_run", "is_pending", "note_pending", "stored_config"]

log = logging.getLogger(__name__)

_GONE = "is gone"
# Of a start that has chosen a lineage and whose ranks have not loaded yet.
_PENDING = ".pending-start.json"


def begin_run(
    config_dict: dict[str, Any], run_dir: Path, corpus: Corpus, overrides: Sequence[str], record: RunRecord
) -> None:
    """Writes what a start changes in the run: its config, and last its record. Safe to repeat and to be killed in.

    Args:
        config_dict: the accepted config as plain values.
        run_dir: the run's directory.
        corpus: of the command.
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
    _write_config(config_dict, run_dir, corpus, overrides)
    record.save(run_dir)
    (run_dir / _PENDING).unlink(missing_ok=True)


def _keep_rows(run_dir: Path, lineage: Lineage) -> None:
    """Copies the logs of a lineage that is about to be set aside; safe to repeat."""
    target = run_dir / "lineages" / lineage.id
    target.mkdir(parents=True, exist_ok=True)
    for name in (METRICS, SAMPLES):
        if (run_dir / name).exists():
            shutil.copyfile(run_dir / name, target / f"{name}.tmp")
            (target / f"{name}.tmp").rename(target / name)


def _write_config(config_dict: dict[str, Any], run_dir: Path, corpus: Corpus, overrides: Sequence[str]) -> None:
    """The accepted config, the overrides as Hydra writes them, and the tokenizer."""
    tokenizer = run_dir / "tokenizer.json"
    body = corpus.tokenizer_file.read_bytes()
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


def stored_config(run_dir: Path, record: RunRecord | None, complete: Sequence[StoredStep]) -> dict[str, Any] | None:
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


def note_pending(run_dir: Path, environ: Mapping[str, str]) -> None:
    """Says that this launch has chosen a lineage which is not recorded before the ranks have loaded.

    A restart before that must choose it again: `run.resume=never` and `run.rewind` act once a launch.
    """
    if _launch_of(environ):
        write_json(run_dir / _PENDING, {"launch": _launch_of(environ)})


def is_pending(run_dir: Path, environ: Mapping[str, str]) -> bool:
    """Whether this launch has chosen a lineage before, and none of its ranks has loaded since."""
    try:
        noted = parse_json(read_regular(run_dir / _PENDING, 1 << 16))
    except (OSError, DocumentError):
        return False
    return bool(_launch_of(environ)) and noted == {"launch": _launch_of(environ)}


def _launch_of(environ: Mapping[str, str]) -> str:
    return environ.get("TORCHELASTIC_RUN_ID") or environ.get("SLURM_JOB_ID") or ""
