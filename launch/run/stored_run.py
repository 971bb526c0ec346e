"""What a run's directory says of itself: its config, and where its steps lie. No torch."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from regrow.checkpoint.errors import CheckpointError
from regrow.checkpoint.files import read_regular
from regrow.checkpoint.storage.base import Storage
from regrow.checkpoint.storage.local import LocalStorage
from regrow.checkpoint.storage.opening import is_url, open_storage
from regrow.trainer.run_files import CONFIG

__all__ = ["steps_place", "stored_config", "stored_steps"]

_LIMIT_BYTES = 64 << 20


def stored_config(run_dir: Path) -> dict[str, Any]:
    """The config that a run was accepted with, as plain values.

    Raises:
        CheckpointError: it is not there, or cannot be read.
    """
    path = run_dir / CONFIG
    try:
        stored = OmegaConf.to_container(OmegaConf.create(read_regular(path, _LIMIT_BYTES).decode()))
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, RecursionError, OSError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error).partition("\n")[0]
        raise CheckpointError(
            f"{path} must be a run's config, but cannot be read ({reason}); restore it from "
            f"{run_dir / '.hydra' / CONFIG}"
        ) from error
    if not isinstance(stored, dict) or not all(isinstance(stored.get(n), dict) for n in ("checkpoint", "run")):
        raise CheckpointError(f"{path} must be a run's config, but is none; give a run's directory")
    return {str(k): v for k, v in stored.items()}


def stored_steps(run_dir: Path, config: dict[str, Any]) -> Storage:
    """Where the steps of a run lie, by its config: below its directory, or below a URL in a folder of its name."""
    checkpoint = config["checkpoint"]
    folder = str(checkpoint.get("folder", "checkpoint"))
    if is_url(folder):
        return open_storage(f"{folder.rstrip('/')}/{config['run']['name']}", checkpoint.get("storage_options") or {})
    return open_storage(run_dir / folder)


def steps_place(place: Storage) -> Storage:
    """Of a run's directory, where its config says that its steps lie; any other place is itself."""
    if not isinstance(place, LocalStorage) or not (place.path / CONFIG).is_file():
        return place
    return stored_steps(place.path, stored_config(place.path))
