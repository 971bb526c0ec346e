"""Fields that came after version 0.1.0 rename no run, and none can be added without saying that it is one of them."""

import dataclasses
import json
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import pytest
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from regrow.launch.config.identity import compare, config_hash, is_hyperparameter, is_identity
from regrow.launch.config.later_fields import is_later, later_defaults
from regrow.launch.config.schema import Config
from tests.support import REPO

FROZEN: dict[str, list[str]] = json.loads((REPO / "tests/compatibility/identity_fields_0_1_0.json").read_text())


class Kind(Enum):
    one = "1"
    two = "2"


@dataclass(kw_only=True, slots=True)
class Inner:
    width: int = 1
    depth: int = field(default=4, metadata={"since": "0.2.0"})


@dataclass(kw_only=True, slots=True)
class Optimizer:
    lr: float = 0.1
    kind: Kind = field(default=Kind.one, metadata={"since": "0.2.0"})
    extra: Inner | None = field(default=None, metadata={"since": "0.2.0"})
    inner: Inner = field(default_factory=Inner)
    whole: Inner = field(default_factory=Inner, metadata={"since": "0.2.0"})
    names: list[str] = field(default_factory=lambda: ["a"], metadata={"since": "0.2.0"})


@dataclass(kw_only=True, slots=True)
class Root:
    optimizer: Optimizer = field(default_factory=Optimizer)
    seed: int = 0


LATER: dict[str, Any] = {
    "optimizer.kind": "one",
    "optimizer.extra": None,
    "optimizer.inner.depth": 4,
    "optimizer.whole.width": 1,
    "optimizer.whole.depth": 4,
    "optimizer.names": ["a"],
}


def plain(config: Root) -> dict[str, Any]:
    values = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(values, dict)
    return {str(k): v for k, v in values.items()}


def test_they_are_found_in_typed_and_in_composed_configs() -> None:
    assert later_defaults(Root()) == LATER
    assert later_defaults(OmegaConf.structured(Root)) == LATER
    assert later_defaults(OmegaConf.structured(Optimizer), "optimizer.") == LATER


def test_at_their_defaults_they_are_in_no_hash_and_elsewhere_in_each() -> None:
    first = {"optimizer": {"lr": 0.1, "inner": {"width": 1}}, "seed": 0}
    before = config_hash(first)
    assert config_hash(plain(Root()), LATER) == before
    others = [
        Optimizer(kind=Kind.two),
        Optimizer(extra=Inner()),
        Optimizer(inner=Inner(depth=5)),
        Optimizer(whole=Inner(width=2)),
        Optimizer(names=[]),
    ]
    hashes = {config_hash(plain(Root(optimizer=o)), LATER) for o in others}
    assert len({before, *hashes}) == 1 + len(others)
    # A run from before them has the defaults.
    assert compare(first, plain(Root()), LATER) == ([], [])
    _, changed = compare(first, plain(Root(optimizer=Optimizer(kind=Kind.two))), LATER)
    assert [str(c) for c in changed] == ["optimizer.kind is 'two' where the run has 'one'"]


def test_z_loss_is_a_hyperparameter_of_runs_that_use_it() -> None:
    assert is_hyperparameter("train.z_loss")
    assert later_defaults(Config())["train.z_loss"] == 0.0
    stored = {"train": {"grad_clip": 1.0}}
    given = {"train": {"grad_clip": 1.0, "z_loss": 1e-4}}
    assert config_hash(given, {"train.z_loss": 0.0}) != config_hash(stored)
    _, changed = compare(stored, given, {"train.z_loss": 0.0})
    assert [str(c) for c in changed] == ["train.z_loss is 0.0001 where the run has 0.0"]


def identity_fields(kind: Any, prefix: str) -> dict[str, bool]:
    """Dotted names of a schema's fields that tell runs apart, and whether they came later."""
    found: dict[str, bool] = {}
    for item in dataclasses.fields(kind):
        name, nested = f"{prefix}.{item.name}", item.type
        if dataclasses.is_dataclass(nested):
            inner = identity_fields(nested, name)
            found |= {n: later or is_later(item) for n, later in inner.items()}
        elif is_identity(name) or is_hyperparameter(name):
            found[name] = is_later(item)
    return found


def schemas() -> dict[str, dict[str, bool]]:
    """Regrow's own, of each section, by `section/name`; the root's fields under the empty name."""
    root = {f.name: is_later(f) for f in dataclasses.fields(Config) if f.name in ("seed",)}
    found: dict[str, dict[str, bool]] = {"": root}
    for section, nodes in ConfigStore.instance().repo.items():
        for name, node in nodes.items() if isinstance(nodes, dict) else ():
            # Below `hydra` lie groups of groups.
            kind = None if isinstance(node, dict) else node.node._metadata.object_type
            if kind is not None and kind.__module__.startswith("regrow."):
                found[f"{section}/{name.removesuffix('.yaml')}"] = identity_fields(kind, section)
    return {name: fields for name, fields in found.items() if fields}


@pytest.mark.parametrize("schema", sorted(FROZEN))
def test_a_new_field_is_marked_or_it_would_rename_every_run(schema: str) -> None:
    """A field that is new says `metadata={"since": …}`; one of version 0.1.0 neither goes nor takes another name."""
    first = {name for name, later in schemas()[schema].items() if not later}
    assert first == set(FROZEN[schema])


def test_a_section_that_is_new_has_such_fields_alone() -> None:
    """Another choice of a section that was there may have any: nobody has run it yet."""
    sections = {schema.partition("/")[0] for schema in FROZEN}
    new = {n: fields for n, fields in schemas().items() if n.partition("/")[0] not in sections}
    assert [n for n, fields in new.items() if not all(fields.values())] == []
