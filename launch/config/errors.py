"""One sentence for each thing a user can get wrong: field, rule, value, remedy."""

import dataclasses
import errno
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    ConfigTypeError,
    GrammarParseError,
    InterpolationResolutionError,
    InterpolationToMissingValueError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from regrow.checkpoint.documents import DocumentError
from regrow.checkpoint.errors import CheckpointError
from regrow.errors import ConfigError
from regrow.launch.config.hints import (
    example_of,
    one_line,
    quoted_override,
    section_fields,
    unknown_choice,
    unknown_field,
)
from regrow.launch.config.identity import is_free
from regrow.launch.config.overrides import is_multirun, parse_overrides, swept_keys
from regrow.launch.config.schema import Config

__all__ = [
    "EXPLAINED",
    "UserError",
    "check_arguments",
    "check_chdir",
    "check_no_hub_name",
    "describe",
    "describe_run_folder",
    "naming_fields",
    "not_alone",
]


# Errors whose message is the whole explanation for a user; any other one is a bug, and is shown with its traceback.
EXPLAINED = (ConfigError, CheckpointError, DocumentError)

# Fields of the root schema that are values, not sections or groups.
_ROOT_VALUES = ("seed", "mode")


class UserError(ConfigError):
    """Bad input, found before training; its message is the whole explanation."""


def check_arguments(arguments: Sequence[str]) -> None:
    """Refuses command lines that Hydra would misread or explain badly.

    Raises:
        UserError: with the right form.
    """
    for i, argument in enumerate(arguments):
        if re.match(r"[+~]*=", argument):
            raise UserError(f"an override must begin with a field's name, but {argument} does not; write FIELD=VALUE")
        if re.match(r"--[a-z_]+\.[a-z_.]+", argument):
            name, _, value = argument[2:].partition("=")
            value = value or (arguments[i + 1] if i + 1 < len(arguments) else "VALUE")
            raise UserError(f"fields are set without dashes: write {name}={_listed(name, value)} for {argument}")
        name, _, value = argument.partition("=")
        if name == "checkpoint.exclude_from_loading" and value and not value.startswith("["):
            raise UserError(
                f"checkpoint.exclude_from_loading must be a list, but is {value}; write {name}={_listed(name, value)}"
            )
    _check_groups(arguments)
    if is_multirun(arguments):
        _check_sweep(arguments)


def _check_groups(arguments: Sequence[str]) -> None:
    """A section or group takes a choice's name; for a number Hydra has a traceback alone."""
    for override in parse_overrides(arguments):
        key = override.key_or_group
        if key in _ROOT_VALUES or key not in _sections() or override.is_sweep_override() or override.is_delete():
            continue
        if isinstance(override.value(), int | float | bool | dict):
            raise UserError(
                f"{key} must be the name of a choice, or be set by its fields, but is "
                f"{override.get_value_element_as_str()}; write for instance {_field_in(key)}=VALUE"
            )


def _listed(name: str, value: str) -> str:
    return f"[{value}]" if name.endswith("exclude_from_loading") and not value.startswith("[") else value


def _check_sweep(arguments: Sequence[str]) -> None:
    """Two runs of a sweep must never share a directory."""
    swept = swept_keys(arguments)
    named = next((o for o in parse_overrides(arguments) if o.key_or_group == "run.name"), None)
    if named is not None and "run.name" not in swept and swept and "${" not in str(named.value()):
        raise UserError(
            f"run.name must differ between the runs of a sweep, but is {named.value()}; leave it out, or use "
            "run.root to keep a sweep together"
        )
    for key in swept:
        if named is None and is_free(key) and not key.startswith("hydra"):
            raise UserError(not_alone(key))


def check_chdir(*, chdir: bool | None) -> None:
    """Whether runs stay in the folder in which the command is given.

    Raises:
        UserError: `hydra.job.chdir` is set.
    """
    if chdir:
        raise UserError(
            "hydra.job.chdir must be false, but is true: data.files, run.root and other paths are relative to the "
            "folder in which the command is given; leave it out"
        )


def check_no_hub_name(field: str, value: str) -> None:
    """Whether a value that must be a folder here is rather a model's name on the Hugging Face Hub.

    Raises:
        UserError: it looks like one, and there is no such folder.
    """
    name = re.fullmatch(r"(?:https?://huggingface\.co/|hf://)?([\w.-]+/([\w.-]+))/?", value, flags=re.ASCII)
    if name is None or name.group(1).startswith(".") or Path(value).expanduser().exists():
        return
    known, folder = name.groups()
    raise UserError(
        f"{field} must be a folder that is here, but {value} is not; if it is a name on the Hugging Face Hub, "
        f"download it first (hf download {known} --local-dir {folder}) and give {field}={folder}"
    )


def not_alone(key: str) -> str:
    """The sentence for a swept field or group that does not make a run another one."""
    # A group's choice is no field of the config.
    value = f"${{{key}}}" if "." in key or key in _ROOT_VALUES else f"${{hydra:runtime.choices.{key}}}"
    return (
        f"{key} must not be swept alone, because it does not enter a run's name and the runs would share a "
        f"directory; add for instance run.name='{key}-{value}'"
    )


# What a field's place must be, for the sentence about an operating system's refusal.
_RULES = {
    "run.root": "a folder that can be written",
    "checkpoint.folder": "a folder that can be written",
    "checkpoint.initial_load_path": "a checkpoint that can be read",
    "data.cache": "a folder that can be written",
    "data.files": "files that can be read",
    "data.path": "a folder that can be read",
    "data.tokenizer": "a file that can be read",
    "model.path": "a folder that can be read",
    "--config-dir": "a folder of files that can be read",
}


@contextmanager
def naming_fields(*places: tuple[str, str | Path | None]) -> Iterator[None]:
    """Turns what the operating system refuses inside the block into a sentence with the path and its field.

    Args:
        places: what is read and written inside: fields, and where their values lie. The first is the one that is
            written most, and meant where the disk is full and the error says no path.

    Raises:
        UserError: for an OSError of the system's own.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise  # a sentence of ours
        known = [(field, Path(path).expanduser().absolute()) for field, path in places if path is not None]
        raise UserError(_refused_path(error, known)) from error


def _refused_path(error: OSError, places: Sequence[tuple[str, Path]]) -> str:
    reason = error.strerror or type(error).__name__
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error.filename, str):
        field, shown = _field_of(Path(error.filename).absolute(), places), error.filename
    elif full or len(places) == 1:
        field, shown = places[0][0], str(places[0][1])
    else:
        every = " or ".join(f"{field} ({path})" for field, path in places)
        return f"{every} cannot be read or written ({reason}); check them"
    remedy = "free some space there, or choose another one" if full else "check it, or choose another one"
    if not field:
        return f"{shown} cannot be used ({reason}); check that it is there and may be used"
    return f"{field} must be {_RULES[field]}, but {shown} cannot ({reason}); {remedy}"


def _field_of(path: Path, places: Sequence[tuple[str, Path]]) -> str:
    """The field whose place a path lies in or leads to, the nearest of several; empty where there is none."""
    inside = [(len(place.parts), field) for field, place in places if path.is_relative_to(place)]
    above = [(0, field) for field, place in places if place.is_relative_to(path)]
    return max([*inside, *above[:1]], default=(0, ""))[1]


def describe_run_folder(error: OSError, arguments: Sequence[str]) -> str:
    """The sentence for an OSError of Hydra's, which makes the run's folder and reads the config's files.

    Args:
        error: Hydra's.
        arguments: the command line.
    """
    path = Path(str(error.filename or ""))
    if error.errno == errno.ENAMETOOLONG and len(os.fsencode(path.name)) > _NAME_MAX:
        return (
            f"run.name must be at most {_NAME_MAX} bytes long, but {path.name[:40]}… has "
            f"{len(os.fsencode(path.name))}; choose a shorter one"
        )
    if path.suffix in (".yaml", ".yml") and path.name != "multirun.yaml":
        return _refused_path(error, [("--config-dir", path.parent.absolute())])
    own = next((a.partition("=")[0] for a in arguments if a.startswith(("hydra.run.", "hydra.sweep."))), None)
    sentence = _refused_path(error, [("run.root", path.absolute())])
    return sentence.replace("run.root", own, 1) if own else sentence


_NAME_MAX = 255


def describe(error: BaseException) -> str | None:
    """The sentence for an error that a user caused; None for any other."""
    if isinstance(error, EXPLAINED):
        return str(error)
    # What one of ours raised for Hydra or OmegaConf arrives in an error of theirs.
    cause: BaseException | None = error if isinstance(error, HydraException | OmegaConfBaseException) else None
    while cause is not None:
        sentence = _describe_one(cause)
        if sentence is not None:
            return sentence
        cause = cause.__cause__ or cause.__context__
    return one_line(str(error)) if isinstance(error, HydraException | OmegaConfBaseException) else None


def _describe_one(error: BaseException) -> str | None:
    if isinstance(error, EXPLAINED):
        return str(error)
    if isinstance(error, MissingConfigException):
        return _unknown_choice(str(error))
    if isinstance(error, OverrideParseException):
        return _unreadable(error)
    if isinstance(error, ConfigCompositionException):
        return _composition(str(error)) if error.__cause__ is None else None
    if isinstance(error, OmegaConfBaseException):
        return _describe_value(error)
    return None


def _describe_value(error: OmegaConfBaseException) -> str | None:
    """For what OmegaConf refuses."""
    if isinstance(error, InterpolationToMissingValueError):
        name = str(error).splitlines()[0].rpartition(" ")[2]
        return f"{name} must be set, but is missing; add {name}=VALUE"
    if isinstance(error, InterpolationResolutionError | GrammarParseError):
        return _interpolation(error)
    if isinstance(error, ConfigTypeError) and "deletion" in str(error):
        return f"{error.full_key} cannot be removed with ~; give it another value"
    if isinstance(error, ConfigTypeError):
        return (
            f"{error.full_key} cannot be set so ({_first_line(error)}); write a list as [a,b], a section as {{a:1}}"
        )
    if isinstance(error, ConfigKeyError | ConfigAttributeError):
        return _unknown_key(error.full_key or "", error.parent_node)
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} must be set, but is missing; add {error.full_key}=VALUE"
    return _wrong_value(error) if isinstance(error, ValidationError) else None


def _first_line(error: BaseException) -> str:
    text = str(error).splitlines()[0]
    return f"{text[:1].lower()}{text[1:]}".rstrip(".")


def _interpolation(error: OmegaConfBaseException) -> str | None:
    """For `${…}` that leads nowhere."""
    text = str(error).splitlines()[0]
    missing = re.search(r"Interpolation key '(.*)' not found", text)
    if missing:
        return (
            f"${{{missing.group(1)}}} must name a field of the config, but {missing.group(1)} is none; name another, "
            f"or write \\${{{missing.group(1)}}} for the text itself"
        )
    variable = re.search(r"Environment variable '(.*)' not found", text)
    if variable:
        return (
            f"${{oc.env:{variable.group(1)}}} must name a variable of the environment, but {variable.group(1)} is "
            f"not set; set it, or write ${{oc.env:{variable.group(1)},DEFAULT}}"
        )
    if isinstance(error, GrammarParseError):
        where = error.full_key or "a value"
        return f"{where} has a ${{…}} that cannot be read ({_first_line(error)}); close its braces"
    # Errors that a resolver raised are described by themselves.
    return None


def _unreadable(error: OverrideParseException) -> str:
    override = str(error.override)
    key, equals, value = override.partition("=")
    reason = one_line(str(error.args[0]).splitlines()[0])
    if not equals:
        reason, remedy = "it has no =", f"write {key}=VALUE" if re.fullmatch(r"[\w./]+", key) else "write FIELD=VALUE"
        if key in _sections():
            remedy = f"write {key}.FIELD=VALUE"
        return f"the override {override!r} cannot be read ({reason}); {remedy}"
    quoted = quoted_override(override)
    if value.startswith("[") and not value.rstrip().endswith("]"):
        reason = "its [ is not closed"
    elif "LexerNoViableAltException" in reason:
        reason = "it holds letters or signs that must stand in quotes"
    remedy = f"write {quoted}" if quoted else "write section.field=value, with quotes around special signs"
    return f"the override {override!r} cannot be read ({reason}); {remedy}"


def _unknown_choice(message: str) -> str:
    found = re.search(r"Could not find '([^']+)/([^'/]+)'", message)
    if found is None:
        return one_line(message)
    group, choice = found.groups()
    names = [line.strip() for line in message.splitlines() if line.startswith("\t")]
    return unknown_choice(group, choice, [n for n in names if not n.endswith("_schema") and "=" not in n])


def _field_in(section: str) -> str:
    """A field to show."""
    return next(iter(section_fields(section)), f"{section}.FIELD")


def _sections() -> list[str]:
    return [f.name for f in dataclasses.fields(Config)]


def _unknown_key(full_key: str, parent: object) -> str:
    known = [str(k) for k in parent] if OmegaConf.is_dict(parent) and not parent._is_none() else []  # type: ignore[attr-defined]
    return unknown_field(full_key, known or _sections())


def _composition(message: str) -> str:
    found = re.search(r"Could not override '([^']+)'", message)
    key = found.group(1).partition("@")[0] if found else ""
    if key in _sections():
        return f"{key} is a section and has no value of its own; set its fields, as in {_field_in(key)}=VALUE"
    if found:
        return unknown_field(key, _sections())
    twice = re.search(r"Multiple values for (\S+?)\.", message)
    if twice:
        return f"{twice.group(1)} must be chosen once, but is chosen twice; write {twice.group(1)}=CHOICE without a +"
    swept = re.search(r"Ambiguous value for argument '([^=]*)=(.*)'", message)
    if swept:
        key, value = swept.groups()
        text = f"\"{key}='{value}'\""
        return (
            f"{key} must have one value, but {key}={value} has several; write -m {key}={value} to sweep over them, "
            f"{key}=[{value}] for a list, or {text} for a text with commas"
        )
    return one_line(message)


def _wrong_value(error: ValidationError) -> str:
    text, name = str(error).splitlines()[0], error.full_key
    wanted = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}
    converted = re.search(r"Value '(.*)' of type '\w+' could not be converted to (\w+)", text)
    if converted:
        value, kind = converted.groups()
        remedy = example_of(value) if kind == "Integer" else "true" if kind == "Boolean" else "VALUE"
        return f"{name} must be {wanted.get(kind, kind)}, but is {value!r}; write {name}={remedy}"
    enum = re.search(r"Invalid value '(.*)', expected one of \[(.*)\]", text)
    if enum:
        return f"{name} must be one of {enum.group(2)}, but is {enum.group(1)!r}; choose one of them"
    if "is not a ListConfig, list or tuple" in text:
        return f"{name} must be a list, but is {str(error.value)!r}; write {name}=[{error.value}]"
    if "None" in text or error.value is None:
        return f"{name} must not be null, but is; leave it out or give a value"
    return f"{name}: {_first_line(error)}; give a value of the field's type"
