"""What makes a run the run it is: names, hashes, and comparing a command with what is stored. Pure."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from regrow.launch.config.target_names import first_target

__all__ = [
    "Difference",
    "Membership",
    "compare",
    "config_hash",
    "flatten",
    "former_sweep_name",
    "is_allowed",
    "is_free",
    "membership",
    "sweep_name",
]

# Fields by prefix. Identity may never change; hyperparameters only when allowed by name; the rest is free.
_HYPERPARAMETERS = (
    "optimizer.",
    "scheduler.",
    "precision.",
    "train.grad_clip",
    "train.z_loss",
    "data.stages",
    "data.on_exhausted",
)
# Of a mixture's sources, by the last part of the name.
_SOURCES = "data.sources."
_SOURCE_HYPERPARAMETERS = ("weight", "max_epochs")
_SOURCE_LOCATIONS = ("files", "path")
_IDENTITY = ("model.", "data.", "seed")
_FREE = (
    "data.cache",
    "data.workers",
    "data.prefetch",
    "data.micro_batch_size",
    "data.log_samples",
    "data.validation_sets",
    "model._target_",
    "model.attention",
    "model.hf_assets_path",
    "model.load_weights",
    "data._target_",
)
# Where data lies is part of a run's default name, but what is compared is its fingerprint.
_LOCATIONS = ("data.files", "data.path", "data.tokenizer")


class Membership(Enum):
    """What a field is for a run.

    Attributes:
        identity: it makes the run what it is, and never changes within one.
        hyperparameter: it changes within a run only where `run.allow_change` names it.
        location: it says where something lies; what lies there may not change, and is compared by its fingerprint.
        free: it may change at every start of the same run, and is in no run's name.
    """

    identity = "identity"
    hyperparameter = "hyperparameter"
    location = "location"
    free = "free"


@dataclass(frozen=True, slots=True)
class Difference:
    """One field that is not what it was."""

    name: str
    stored: Any
    given: Any

    def __str__(self) -> str:
        return f"{self.name} is {self.given!r} where the run has {self.stored!r}"


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted names; classes by the names that they had first."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = first_target(value) if key == "_target_" and isinstance(value, str) else value
    return flat


def _has_prefix(name: str, prefixes: Iterable[str]) -> bool:
    return any(name.startswith(p) if p.endswith(".") else name == p or name.startswith(f"{p}.") for p in prefixes)


def _is_of_source(name: str, fields: tuple[str, ...]) -> bool:
    """Whether it is one of these fields of a mixture's source."""
    _, _, field = name.removeprefix(_SOURCES).partition(".")
    return name.startswith(_SOURCES) and field in fields


def is_identity(name: str) -> bool:
    """Whether a field may never differ within a run."""
    return _has_prefix(name, _IDENTITY) and not _has_prefix(name, _FREE) and not is_hyperparameter(name)


def is_hyperparameter(name: str) -> bool:
    """Whether a field may differ only when it is allowed by name."""
    return _has_prefix(name, _HYPERPARAMETERS) or _is_of_source(name, _SOURCE_HYPERPARAMETERS)


def is_allowed(name: str, allowed: Iterable[str]) -> bool:
    """Whether `run.allow_change` names a field, or a section that it is in."""
    return _has_prefix(name, allowed)


def is_free(name: str) -> bool:
    """Whether a field (or group) may change at any time; such fields are in no name and no hash."""
    return (
        not is_identity(f"{name}.")
        and not is_identity(name)
        and not is_hyperparameter(f"{name}.")
        and not is_hyperparameter(name)
    )


def membership(name: str) -> Membership:
    """What a field is for a run.

    Args:
        name: dotted.
    """
    if _has_prefix(name, _LOCATIONS) or _is_of_source(name, _SOURCE_LOCATIONS):
        return Membership.location
    if is_hyperparameter(name):
        return Membership.hyperparameter
    return Membership.identity if is_identity(name) else Membership.free


def config_hash(config: Mapping[str, Any], later: Mapping[str, Any] | None = None) -> str:
    """Eight hex digits over identity and hyperparameters.

    Args:
        config: as plain values.
        later: fields that came after version 0.1.0 with their defaults, at which they do not count.
    """
    later = later or {}
    chosen = {
        k: v
        for k, v in flatten(config).items()
        if (is_identity(k) or is_hyperparameter(k)) and not (k in later and later[k] == v)
    }
    canonical = json.dumps(chosen, sort_keys=True, default=str)
    return hashlib.blake2b(canonical.encode(), digest_size=4).hexdigest()


def compare(
    stored: Mapping[str, Any], given: Mapping[str, Any], later: Mapping[str, Any] | None = None
) -> tuple[list[Difference], list[Difference]]:
    """What differs: (identity, hyperparameters).

    Args:
        stored: as plain values.
        given: the same of the command. What the stored config does not know is equal.
        later: but for these fields, which a config from before them has at these defaults.
    """
    old, new = {**(later or {}), **flatten(stored)}, flatten(given)
    identity, hyperparameters = [], []
    for name, value in sorted(new.items()):
        elsewhere = _has_prefix(name, _LOCATIONS) or _is_of_source(name, _SOURCE_LOCATIONS)
        if name not in old or old[name] == value or elsewhere:
            continue
        difference = Difference(name, old[name], value)
        if is_identity(name):
            identity.append(difference)
        elif is_hyperparameter(name):
            hyperparameters.append(difference)
    return identity, hyperparameters


def sweep_name(model_name: str, swept: Sequence[tuple[str, Any]], digest: str) -> str | None:
    """A run's name in a sweep: the model, what is swept, and the hash of what makes the run what it is.

    Values that would make it too long are cut and hashed; every swept field keeps its name.

    Args:
        model_name: `model.name`.
        swept: (key, canonical value) of what differs between the runs.
        digest: `config_hash`, which tells runs apart that share all of that.

    Returns:
        The name, None where the fields' names alone are too long for a folder's.
    """
    pairs = sorted((key, str(value)) for key, value in swept)
    for width in (_NAME_LENGTH, 40, 24, 16, _HASH_DIGITS):
        fields = ",".join(f"{_safe(key)}={_cut(value, width)}" for key, value in pairs)
        name = "-".join(part for part in (model_name, fields, digest) if part)
        if len(name.encode()) <= _NAME_LENGTH:
            return name
    return None


# Below the 255 bytes of file systems, with room for what is made beside a run's folder (`NAME.log`).
_NAME_LENGTH = 200
_HASH_DIGITS = 8


def _safe(text: str) -> str:
    return re.sub(r"[^\w.,=+-]", "_", text, flags=re.ASCII)


def _cut(value: str, width: int) -> str:
    """A value in at most so many characters; what is cut off is told apart by a hash."""
    if len(value) <= width:
        return _safe(value)
    digest = hashlib.blake2b(value.encode(errors="replace"), digest_size=_HASH_DIGITS // 2).hexdigest()
    kept = width - _HASH_DIGITS - 2
    return f"{_safe(value[:kept])}..{digest}" if kept > 0 else digest


def former_sweep_name(model_name: str, overrides: Sequence[tuple[str, Any]]) -> str | None:
    """A sweep's run as version 0.1.0 named it: by all overrides that are not free; None where none is left.

    Args:
        model_name: `model.name`.
        overrides: (key, canonical value) in the order given.
    """
    parts = sorted(f"{key}={value}" for key, value in overrides if not is_free(key))
    if not parts:
        return None
    exact = ",".join(parts)
    text = _safe(exact)
    if text != exact or len(text) > 160:
        # What was replaced or cut off must still tell two runs apart.
        text = f"{text[:140]}-{hashlib.blake2b(exact.encode(errors='replace'), digest_size=4).hexdigest()}"
    return f"{model_name}-{text}"
