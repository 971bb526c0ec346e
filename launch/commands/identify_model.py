"""Which model a checkpoint is of: by its manifest, a `config.json`, its run's config, or a variant's name."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

import regrow.models
from regrow.checkpoint.errors import CheckpointError
from regrow.checkpoint.format.manifest import read_manifest
from regrow.checkpoint.format.step_name import METADATA
from regrow.checkpoint.load.initial_load import pin_source
from regrow.checkpoint.load.loading import is_verified
from regrow.checkpoint.load.open_source import is_hf_folder, open_source
from regrow.checkpoint.storage.base import Storage
from regrow.checkpoint.storage.local import LocalStorage
from regrow.checkpoint.storage.opening import as_storage
from regrow.errors import ConfigError
from regrow.launch.config.composition import compose_config
from regrow.launch.config.package_configs import use_packages
from regrow.launch.config.package_schemas import schemas_of
from regrow.launch.config.plugins import active_packages, allowed_roots, how_to_name
from regrow.launch.config.refusals import refusing
from regrow.launch.config.resolve import checking
from regrow.launch.config.schema import config_modules
from regrow.launch.config.target_names import canonical_target
from regrow.launch.run.prepare import convert_config
from regrow.launch.run.weights import model_of_folder
from regrow.models.config import ModelConfig
from regrow.trainer.run_files import CONFIG

__all__ = ["model_from_settings", "model_of", "run_folder_of", "section_of_run", "settings_of_model", "variant"]


def section_of_run(step: Storage, name: str) -> dict[str, Any]:
    """A section of the config of the run that a step lies in; empty where there is no such config."""
    run = run_folder_of(step)
    if run is None:
        return {}
    try:
        stored = OmegaConf.to_container(OmegaConf.load(run / CONFIG))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException):
        # Somebody else's file of that name.
        return {}
    section = stored.get(name) if isinstance(stored, dict) else None
    return {str(k): v for k, v in section.items()} if isinstance(section, dict) else {}


class UnknownModelError(CheckpointError):
    """A checkpoint does not say what it is of."""


def variant(name: str, overrides: Collection[str] = ()) -> ModelConfig:
    """The config of a variant in `conf/model`.

    Args:
        name: of the variant.
        overrides: `model.FIELD=VALUE`.

    Raises:
        ConfigError: there is none of that name, or no such field.
    """
    with refusing():
        return convert_config(compose_config([f"model={name}", *overrides]))[0].model


def settings_of_model(config: ModelConfig) -> dict[str, Any]:
    """A config as plain values, as a manifest holds them."""
    values = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(values, dict)
    return {str(k): v for k, v in values.items()}


def model_from_settings(values: Mapping[str, Any], where: str) -> ModelConfig:
    """The inverse of `settings_of_model`; fields that this version does not have are left out.

    Raises:
        ConfigError: this version has no such model.
    """
    names = active_packages().names
    target = canonical_target(str(values.get("_target_")), names)
    for kind in _model_schemas():
        defaults = {f.name: f.default for f in dataclasses.fields(kind)}
        if defaults.get("_target_") == target:
            known = {k: v for k, v in values.items() if k in defaults and k != "_target_"}
            try:
                config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), known))
            except OmegaConfBaseException as error:
                reason = str(error).splitlines()[0]
                raise ConfigError(
                    f"{where} must hold a model's config, but {reason}; force one with --model"
                ) from error
            assert isinstance(config, ModelConfig)
            with checking():
                config.check()
            return config
    if not target.startswith(("regrow.", *allowed_roots())):
        raise ConfigError(
            f"{where} must be of a model of a package that is named, but is of {target}; "
            f"{how_to_name(target.partition('.')[0])}"
        )
    raise ConfigError(f"{where} must be of a model that this version has, but is of {target}; force one with --model")


def _model_schemas() -> Iterator[type[Any]]:
    """Of Regrow's models and of the user's own."""
    for module in config_modules(regrow.models):
        for kind in vars(module).values():
            if isinstance(kind, type) and dataclasses.is_dataclass(kind) and "SCHEMA" in vars(kind):
                yield kind
    for name in active_packages().names:
        yield from (kind for kind in schemas_of(name) if issubclass(kind, ModelConfig))


def run_folder_of(step: Storage) -> Path | None:
    """The run's directory that a local step lies in: the nearest folder above it with a `config.yaml`."""
    if not isinstance(step, LocalStorage):
        return None
    return next((p for p in step.path.resolve().parents[:4] if (p / CONFIG).is_file()), None)


def model_of(place: Storage | str, forced: str | None, overrides: Collection[str] = ()) -> ModelConfig:
    """The model that a checkpoint is of, of Regrow's or of a package that is named now.

    Args:
        place: what `open_source` opens.
        forced: a variant's name, which is believed.
        overrides: `model.FIELD=VALUE`, of that variant.

    Raises:
        ConfigError: it cannot be found out.
    """
    use_packages()
    strange = next((o for o in overrides if forced is None or not o.startswith("model.")), None)
    if strange is not None:
        raise ConfigError(
            f"--override must be model.FIELD=VALUE beside --model, but is {strange}; write for instance "
            "--model llama3_debug --override model.dim=256"
        )
    if forced is not None:
        config = variant(forced, overrides)
        with checking():
            config.check()
        return config
    storage = as_storage(place)
    if is_hf_folder(storage):
        return model_of_folder(storage)
    step = pin_source(storage)
    if step.exists(METADATA):
        settings = read_manifest(step).model if is_verified(step) else {}
        settings = settings or section_of_run(step, "model")
        if "_target_" in settings:
            return model_from_settings(settings, step.url)
    # Where it is no checkpoint at all, that is the thing to say.
    open_source(storage).close()
    raise UnknownModelError(
        f"--model must be given, because {storage.url} does not say what it is of; use --model llama3_8b"
    )
