"""One sentence for each thing a user can get wrong: field, rule, value, remedy."""

import difflib
import errno
import re
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
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
    InterpolationToMissingValueError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from launch.identity import is_free
from launch.schema import Config
from trainer.data.source import DataError

__all__ = ["UserError", "check_arguments", "describe"]


class UserError(ValueError):
    """Bad input, found before training; its message is the whole explanation."""


def check_arguments(arguments: Sequence[str]) -> None:
    """Refuses command lines that Hydra would misread or explain badly.

    Raises:
        UserError: with the right form.
    """
    for i, argument in enumerate(arguments):
        if re.match(r"--[a-z_]+\.[a-z_.]+", argument):
            name, _, value = argument[2:].partition("=")
            value = value or (arguments[i + 1] if i + 1 < len(arguments) else "VALUE")
            raise UserError(f"fields are set without dashes: write {name}={_listed(name, value)} for {argument}")
        name, _, value = argument.partition("=")
        if name == "checkpoint.exclude_from_loading" and value and not value.startswith("["):
            raise UserError(
                f"checkpoint.exclude_from_loading must be a list, but is {value}; write {name}={_listed(name, value)}"
            )
    if {"-m", "--multirun"} & set(arguments):
        _check_sweep([a for a in arguments if not a.startswith("-") and "=" in a])


def _listed(name: str, value: str) -> str:
    return f"[{value}]" if name.endswith("exclude_from_loading") and not value.startswith("[") else value


def _check_sweep(arguments: Sequence[str]) -> None:
    """Two runs of a sweep must never share a directory."""
    try:
        overrides = OverridesParser.create().parse_overrides(list(arguments))
    except OverrideParseException:
        return  # Hydra explains it
    swept = [o.key_or_group for o in overrides if o.is_sweep_override()]
    named = next((o for o in overrides if o.key_or_group == "run.name"), None)
    if named is not None and "run.name" not in swept and swept and "${" not in str(named.value()):
        raise UserError(
            f"run.name must differ between the runs of a sweep, but is {named.value()}; leave it out, or use "
            "run.root to keep a sweep together"
        )
    for key in swept:
        if named is None and is_free(key) and not key.startswith("hydra"):
            raise UserError(
                f"{key} must not be swept alone, because it does not enter a run's name and the runs would share "
                f"a directory; add for instance run.name='{key}-${{{key}}}'"
            )


def describe(error: BaseException) -> str | None:
    """The sentence for an error that a user caused; None for any other."""
    cause: BaseException | None = error
    while cause is not None:
        sentence = _describe_one(cause)
        if sentence is not None:
            return sentence
        cause = cause.__cause__ or cause.__context__
    return str(error) if isinstance(error, HydraException | OmegaConfBaseException) else None


def _describe_one(error: BaseException) -> str | None:
    if isinstance(error, UserError | DataError):
        return str(error)
    if isinstance(error, MissingConfigException):
        return _unknown_choice(str(error))
    if isinstance(error, ConfigKeyError | ConfigAttributeError):
        return _unknown_key(error.full_key or "", error.parent_node)
    if isinstance(error, InterpolationToMissingValueError):
        name = str(error).splitlines()[0].rpartition(" ")[2]
        return f"{name} must be set, but is missing; add {name}=VALUE"
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} must be set, but is missing; add {error.full_key}=VALUE"
    if isinstance(error, ValidationError):
        return _wrong_value(error)
    if isinstance(error, OverrideParseException):
        reason = error.args[0].splitlines()[0]
        return f"the override {error.override!r} cannot be read ({reason}); write section.field=value"
    if isinstance(error, ConfigCompositionException) and error.__cause__ is None:
        return _composition(str(error))
    if isinstance(error, OSError) and error.errno in (
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        errno.ENOTDIR,
        errno.ENOSPC,
    ):
        return (
            f"run.root must be a folder that can be written, but {error.filename} cannot ({error.strerror}); "
            "choose another one"
        )
    return None


def _unknown_choice(message: str) -> str:
    found = re.search(r"Could not find '([^']+)/([^'/]+)'", message)
    if found is None:
        return message.splitlines()[0]
    group, choice = found.groups()
    names = [line.strip() for line in message.splitlines() if line.startswith("\t")]
    names = [n for n in names if not n.endswith("_schema") and "=" not in n]
    near = difflib.get_close_matches(choice, names, 1)
    remedy = f"did you mean {group}={near[0]}?" if near else f"use {group}={names[0]}" if names else "check it"
    return f"{group} must be one of {', '.join(names)}, but is {choice!r}; {remedy}"


def _unknown_key(full_key: str, parent: object) -> str:
    section, _, key = full_key.rpartition(".")
    known = [str(k) for k in parent] if OmegaConf.is_dict(parent) and not parent._is_none() else []  # type: ignore[attr-defined]
    if not known:
        known = [f.name for f in __import__("dataclasses").fields(Config)]
    near = difflib.get_close_matches(key, known, 1)
    prefix = f"{section}." if section else ""
    remedy = f"did you mean {prefix}{near[0]}?" if near else f"{section or 'the config'} has {', '.join(known)}"
    return f"{full_key} is not a field; {remedy}"


def _composition(message: str) -> str:
    found = re.search(r"Could not override '([^']+)'", message)
    if found:
        return _unknown_key(found.group(1).partition("@")[0], None)
    return message.splitlines()[0]


def _wrong_value(error: ValidationError) -> str:
    text = str(error).splitlines()[0]
    wanted = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}
    converted = re.search(r"Value '(.*)' of type '\w+' could not be converted to (\w+)", text)
    if converted:
        value, kind = converted.groups()
        return f"{error.full_key} must be {wanted.get(kind, kind)}, but is {value!r}; write {error.full_key}=VALUE"
    enum = re.search(r"Invalid value '(.*)', expected one of \[(.*)\]", text)
    if enum:
        return f"{error.full_key} must be one of {enum.group(2)}, but is {enum.group(1)!r}; choose one of them"
    if "None" in text or error.value is None:
        return f"{error.full_key} must not be null, but is; leave it out or give a value"
    return f"{error.full_key}: {text[0].lower()}{text[1:]}; give a value of the field's type"
