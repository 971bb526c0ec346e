"""The run's Hugging Face folders: `<run>/export/step-N`, complete or not there."""

import shutil
from pathlib import Path

from regrow.checkpoint.files import fsync_folder, naming
from regrow.checkpoint.format.step_name import parse_step_name, step_folder_name
from regrow.checkpoint.load.open_source import open_source
from regrow.checkpoint.storage.base import Storage
from regrow.trainer.hf_folder import HfExport, export_hf

__all__ = ["export_step", "exported_steps", "remove_leftovers"]

# Part of every complete one.
_CONFIG = "config.json"


def exported_steps(folder: Path) -> list[int]:
    """The steps of the complete folders in `<run>/export`, ascending."""
    if not folder.is_dir():
        return []
    found = [(parse_step_name(p.name), p) for p in folder.iterdir()]
    return sorted(step for step, path in found if step is not None and (path / _CONFIG).is_file())


def export_step(checkpoint: Storage | str, folder: Path, export: HfExport, step: int) -> Path:
    """Makes `folder/step-N` from a step; one that is there from an earlier try or line of steps is replaced.

    Raises:
        ValueError: one sentence.
    """
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / step_folder_name(step)
    fresh = folder / f".{out.name}.new"
    shutil.rmtree(fresh, ignore_errors=True)
    with open_source(checkpoint) as source:
        export_hf(source, fresh, export, threads=1)
    if out.exists():
        old = folder / f".{out.name}.old"
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
        fresh.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    else:
        fresh.rename(out)
    with naming(folder):
        fsync_folder(folder)
    return out


def remove_leftovers(folder: Path) -> None:
    """What a killed export left."""
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name.startswith(".") and path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
