"""The default of `run.name`, as an OmegaConf resolver."""

import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from regrow.launch.config.errors import UserError, not_alone
from regrow.launch.config.identity import config_hash, former_sweep_name, is_free, sweep_name
from regrow.launch.config.later_fields import later_defaults
from regrow.trainer.run_files import RECORD

__all__ = ["register_resolver"]

_SECTIONS = ("model", "data", "optimizer", "scheduler", "precision", "train", "seed")


def register_resolver(swept: Sequence[str] = ()) -> None:
    """Makes `${regrow_run_name:}` and `${regrow_folder_name:PATH}` known.

    Args:
        swept: the fields and groups that differ between the runs of the command's sweep. A job of a sweep cannot tell
            them from what is the same for all.
    """
    keys = frozenset(swept)

    def run_name(*, _root_: DictConfig) -> str:
        return _run_name(_root_, keys)

    OmegaConf.register_new_resolver("regrow_run_name", run_name, replace=True)
    OmegaConf.register_new_resolver("regrow_folder_name", _folder_name, replace=True)


def _folder_name(path: str) -> str:
    """A folder's own name, with nothing in it that a run's name could not have."""
    return re.sub(r"[^\w.+=-]", "_", Path(path).expanduser().resolve().name, flags=re.ASCII).lstrip(".") or "model"


def _run_name(root: DictConfig, swept: frozenset[str]) -> str:
    chosen = {name: root._get_node(name) for name in _SECTIONS}
    plain = OmegaConf.to_container(
        OmegaConf.masked_copy(root, list(chosen)), resolve=True, enum_to_str=True, throw_on_missing=False
    )
    assert isinstance(plain, dict)
    config: dict[str, Any] = {str(k): v for k, v in plain.items()}
    if not isinstance(config["model"], dict):
        raise UserError("model must be chosen, but is missing; add model=CHOICE, without ~")
    later = {k: v for name, node in chosen.items() for k, v in later_defaults(node, f"{name}.").items()}
    model_name, digest = str(config["model"]["name"]), config_hash(config, later)
    hydra = _hydra(root)
    if hydra is None or hydra.mode is not RunMode.MULTIRUN:
        return f"{model_name}-{digest}"
    pairs = _canonical(root, list(hydra.overrides.task))
    former = former_sweep_name(model_name, pairs)
    if former is not None and (Path(str(root.run.root)) / former / RECORD).is_file():
        return former
    existing = _existing_name(str(root.run.root), model_name, digest)
    # A sweep may also be written down in the config of a sweeper.
    keys = swept | {str(key) for key in hydra.sweeper.get("params") or ()}
    for key in sorted(keys):
        if is_free(key):
            raise UserError(not_alone(key))
    name = sweep_name(model_name, [(key, value) for key, value in pairs if key in keys], digest)
    if name is None:
        raise UserError(
            f"run.name must be given where so many fields are swept ({len(keys)}) that their names are too long for "
            "a folder's, but is not; add for instance run.name='run-${hydra:job.num}'"
        )
    # A sweep that grew by a field names its runs otherwise; they go on where they are.
    return name if existing is None or (Path(str(root.run.root)) / name).is_dir() else existing


def _existing_name(root: str, model_name: str, digest: str) -> str | None:
    """The folder of the run of this model and hash, whatever was swept when it was named."""
    found = Path(root).glob(f"{glob.escape(model_name)}-*{digest}/{RECORD}")
    names = sorted(path.parent.name for path in found)
    ends = (f"{model_name}-{digest}", f"-{digest}")
    return next((n for n in names if n == ends[0] or n.endswith(ends[1])), None)


def _hydra(root: DictConfig) -> Any:
    """Hydra's own node: part of the config while it composes, global while the job runs."""
    if "hydra" in root:
        return root.hydra
    return HydraConfig.get() if HydraConfig.initialized() else None


def _canonical(root: DictConfig, overrides: list[str]) -> list[tuple[str, Any]]:
    """Overrides with the values that the config has, so that 1e-3 and 0.001 are one run."""
    pairs = []
    for override in OverridesParser.create().parse_overrides(overrides):
        key = override.key_or_group
        value = OmegaConf.select(root, key) if "/" not in key else None
        chosen = override.get_value_element_as_str() if value is None or OmegaConf.is_config(value) else value
        pairs.append((key, chosen))
    return pairs
