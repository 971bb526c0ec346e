"""What can be said of a command before Hydra composes it, which takes longer than all else that a refusal needs."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra._internal.hydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import regrow.conf
from regrow.launch.config.choices import conf_folders, read_choice
from regrow.launch.config.errors import UserError
from regrow.launch.config.hints import unknown_choice, unknown_field
from regrow.launch.config.overrides import parse_overrides
from regrow.launch.config.package_schemas import known_schemas
from regrow.launch.config.plugins import active_packages
from regrow.launch.config.refusals import refusing
from regrow.launch.config.schema import Config
from regrow.models.from_hf_config import FromHfConfig

__all__ = ["check_complete", "check_overrides", "composing_once"]

# Flags that leave the config what it is.
_HARMLESS = ("-m", "--multirun", "--run", "-r")
_SCALARS = (str, int, float, bool, type(None))
# Groups whose choices set anything.
_ANYWHERE = ("experiment",)
# Of `from_hf`, which the folder says.
_FROM_FOLDER = ("model.vocab_size", "model.max_seq_len")


def check_overrides(arguments: Sequence[str]) -> None:
    """Refuses unknown choices and fields, and values of another type; what is not certain is left to Hydra.

    Args:
        arguments: the command line.

    Raises:
        UserError: with what may be meant.
        OmegaConfBaseException: for a value; `describe` has the sentence.
    """
    if any(a.startswith("-") and a not in _HARMLESS for a in arguments):
        return
    overrides = [o for o in parse_overrides(arguments) if not o.is_delete()]
    for override in overrides:
        _check_choice(override)
    if any(o.key_or_group in _ANYWHERE for o in overrides):
        return
    for override in overrides:
        key = override.key_or_group
        if "." in key and "/" not in key and override.package is None and not key.startswith("hydra."):
            _check_field(override, overrides)


def _conf_folders() -> list[Path]:
    return [Path(next(iter(regrow.conf.__path__))), *conf_folders(active_packages().names)]


def _check_choice(override: Override) -> None:
    group, given = override.key_or_group, override.value()
    if group.startswith("hydra/"):
        return  # plugins have choices there
    folders = [folder / group for folder in _conf_folders() if (folder / group).is_dir()]
    if not folders or override.is_sweep_override():
        return
    names = sorted({path.stem for folder in folders for path in (*folder.glob("*.yaml"), *folder.glob("*.yml"))})
    # Loggers combine.
    for choice in given if isinstance(given, list) else [given]:
        if not isinstance(choice, str) or "$" in choice or "/" in choice or choice.endswith("_schema"):
            continue  # a choice may lie deeper, and says so with a slash
        if choice.partition(".")[0] not in names:
            raise UserError(unknown_choice(group, choice, names))


def _check_field(override: Override, overrides: Sequence[Override]) -> None:
    section, *parts = override.key_or_group.split(".")
    roots = {f.name: f.type for f in dataclasses.fields(Config)}
    if section not in roots:
        raise UserError(unknown_field(section, list(roots)))
    if section == "hooks":
        section, chosen = f"hooks.{parts.pop(0)}", _chosen_hook(override.key_or_group.split(".")[1], overrides)
    else:
        chosen = _chosen(section, overrides)
    kind = chosen
    for i, part in enumerate(parts):
        if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
            return  # a name of the user's choice, a list's place, or what is not certain
        if part not in _names(kind):
            raise UserError(unknown_field(".".join((section, *parts[: i + 1])), _names(kind)))
        kind = _type_of(kind, part)
    if parts and not override.is_sweep_override() and isinstance(override.value(), _SCALARS):
        holder = OmegaConf.create({})
        OmegaConf.update(holder, section, chosen)
        # Hydra's own error would be the same one.
        OmegaConf.update(holder, override.key_or_group, override.value())


def _names(kind: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []


def _type_of(kind: Any, name: str) -> Any:
    return next(f.type for f in dataclasses.fields(kind) if f.name == name)


def _chosen(section: str, overrides: Sequence[Override]) -> Any:
    """The schema of a section as the command chooses it; None where that is not certain."""
    kind = next(f.type for f in dataclasses.fields(Config) if f.name == section)
    own = _conf_folders()[0]
    if not (own / section).is_dir():
        return kind
    given = [o for o in overrides if o.key_or_group == section and o.package is None]
    root = read_choice(own / "config.yaml", own)
    choice: Any = dict(root.adds).get(section) if root is not None else None
    for override in given:
        choice = override.value() if not override.is_sweep_override() else None
    found = read_choice(own / section / f"{choice}.yaml", own) if isinstance(choice, str) else None
    return known_schemas().get((section, found.schema)) if found is not None and not found.bases else None


def _chosen_hook(name: str, overrides: Sequence[Override]) -> Any:
    """The schema of a hook that the run surely has; None for any other."""
    own = _conf_folders()[0]
    sets = [o.value() for o in overrides if o.key_or_group == "hooks"]
    root = read_choice(own / "config.yaml", own)
    waiting = [str(sets[-1])] if sets else [dict(root.adds).get("hooks", "")] if root is not None else []
    hooks: dict[str, Any] = {}
    while waiting:
        brought = read_choice(own / "hooks" / f"{waiting.pop()}.yaml", own)
        if brought is not None:
            hooks |= {k.removeprefix("/hook@"): v for k, v in brought.adds}
            waiting += brought.bases
    hooks |= {str(o.package).removeprefix("hooks."): o.value() for o in overrides if o.key_or_group == "hook"}
    found = read_choice(own / "hook" / f"{hooks.get(name)}.yaml", own)
    return known_schemas().get(("hook", found.schema)) if found is not None and not found.bases else None


def check_complete(config: DictConfig) -> None:
    """Refuses a composed config in which a field must still be set.

    Args:
        config: before what a Hugging Face folder says is filled in.

    Raises:
        UserError: with the first such field.
    """
    from_folder = OmegaConf.get_type(config, "model") is FromHfConfig
    with refusing():
        # A value may be made from one that is missing.
        names = sorted(OmegaConf.missing_keys(config))
    for name in names:
        if not (from_folder and name in _FROM_FOLDER):
            raise UserError(f"{name} must be set, but is missing; add {name}=VALUE")


@contextmanager
def composing_once() -> Iterator[None]:
    """Has Hydra say at once what cannot be composed.

    It composes a first time to find `hydra.mode`, drops the error, and composes all again to meet the same one.
    """
    kind = hydra._internal.hydra.Hydra
    former = kind.get_mode

    def get_mode(self: Any, config_name: str | None, overrides: list[str]) -> Any:
        try:
            config = self.compose_config(
                config_name=config_name,
                overrides=overrides,
                with_log_configuration=False,
                run_mode=RunMode.MULTIRUN,
                validate_sweep_overrides=False,
            )
            return config.hydra.mode
        except (HydraException, OmegaConfBaseException):
            raise
        except Exception:
            return None

    kind.get_mode = get_mode  # type: ignore[method-assign]
    try:
        yield
    finally:
        kind.get_mode = former  # type: ignore[method-assign]
