"""What is said of the config is what it is: meanings for all of it, and the defaults that Hydra composes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

import regrow.conf
from regrow.launch.commands.own_catalog import own_catalog
from regrow.launch.config.catalog import PLACES
from regrow.launch.config.choices import read_choices
from regrow.launch.config.identity import Membership, is_free, is_hyperparameter, is_identity, membership
from regrow.launch.config.schema_docs import REQUIRED, describe_schema, summary_of
from tests.composing import compose_config


def kinds() -> list[type[Any]]:
    """Every schema, and every one that is a section of another."""
    catalog = own_catalog()
    waiting = [kind for group in catalog.groups.values() for kind in (group.base, *group.schemas.values()) if kind]
    found: dict[type[Any], None] = {}
    while waiting:
        kind = waiting.pop()
        if kind not in found:
            found[kind] = None
            waiting += [f.section for f in describe_schema(kind).fields if f.section is not None]
    return list(found)


def test_every_field_has_a_meaning() -> None:
    catalog = own_catalog()
    fields = [(kind.__name__, f) for kind in kinds() for f in describe_schema(kind).fields]
    fields += [("Config", f) for f in catalog.root.fields]
    without = [f"{kind}.{f.name}" for kind, f in fields if not f.meaning]
    members = [(kind, f, name, meaning) for kind, f in fields for name, meaning in f.members]
    without += [f"{kind}.{f.name}={name}" for kind, f, name, meaning in members if not meaning]
    assert len(catalog.entries) > 200
    assert not without
    print(f"{len(catalog.entries)} fields of {len(kinds())} schemas, {len(members)} choices of enums, all explained")


def test_every_schema_and_every_file_says_what_it_is() -> None:
    assert not [kind.__name__ for kind in kinds() if not summary_of(kind)]
    choices = [c for group in read_choices([Path(next(iter(regrow.conf.__path__)))]).values() for c in group.values()]
    assert len(choices) > 60
    assert not [c.file for c in choices if not c.comment]


def values(config: DictConfig) -> dict[str, Any]:
    """A composed config as dotted names, interpolations as they are written; mappings by names of a user's choice whole."""
    plain = OmegaConf.to_container(config, resolve=False, enum_to_str=True)
    assert isinstance(plain, dict)

    def flatten(values: Mapping[Any, Any], prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in values.items():
            entry = own_catalog().find(f"{prefix}{key}")
            is_section = isinstance(value, dict) and (entry is None or entry.doc.section is not None)
            found |= flatten(value, f"{prefix}{key}.") if is_section else {f"{prefix}{key}": value}
        return found

    return flatten(plain, "")


def test_defaults_are_those_that_hydra_composes() -> None:
    composed = values(compose_config(["hooks=default"]))
    assert len(composed) > 150
    catalog = own_catalog()
    unknown = [name for name in composed if catalog.find(name) is None]
    assert not unknown
    said = {name: catalog.default_of(name)[0] for name in composed}
    assert said == composed


@pytest.mark.parametrize(
    ("choice", "name", "value", "file"),
    [
        ("model=llama3_8b", "model.dim", 4096, "conf/model/llama3_8b.yaml"),
        ("checkpoint=production", "checkpoint.keep_latest_k", 3, "conf/checkpoint/production.yaml"),
    ],
)
def test_a_choice_sets_what_hydra_takes_from_it(choice: str, name: str, value: object, file: str) -> None:
    group, _, chosen = choice.partition("=")
    catalog = own_catalog()
    found = catalog.groups[group].choices[chosen]
    assert found.file == file
    assert catalog.values_of(found)[name.partition(".")[2]] == value
    assert OmegaConf.select(compose_config([choice]), name) == value


def test_each_default_names_the_file_that_sets_it() -> None:
    catalog = own_catalog()
    assert catalog.default_of("optimizer.lr") == (1e-3, "conf/optimizer/adamw.yaml")
    assert catalog.default_of("hooks.checkpoint.enabled") == ("${checkpoint.enable}", "conf/hook/checkpoint.yaml")
    assert catalog.default_of("hooks.sample.enabled") == (True, "")
    assert catalog.default_of("run.root") == ("outputs", "conf/config.yaml")
    assert catalog.default_of("train.steps") == (1000, "")
    assert catalog.default_of("data.path") == (REQUIRED, "")


def test_entries_of_any_name_are_found() -> None:
    catalog = own_catalog()
    for name in ("checkpoint.save_policies.often.minutes", "data.sources.web.weight", "data.validation_sets.x.files"):
        found = catalog.find(name)
        assert found is not None
        assert found.doc.meaning
    for name in ("data.stages.0.from_step", "hooks.validation.every", "hooks.mine.enabled"):
        assert catalog.find(name) is not None
    for name in ("checkpoint.save_policies.often.weight", "hooks.validation.tasks", "model.facter", "nothing"):
        assert catalog.find(name) is None


def test_places_are_fields_of_the_config() -> None:
    catalog = own_catalog()
    assert {p.removesuffix(".NAME") for p in PLACES.values()} <= {*catalog.entries, "hooks"}


def test_every_field_has_one_part_in_a_run() -> None:
    """As `is_free` and the others decide, which is what names and refusals go by."""
    for name in own_catalog().entries:
        part = membership(name)
        if part is not Membership.location:
            assert (part is Membership.hyperparameter) == is_hyperparameter(name)
            assert (part is Membership.identity) == (is_identity(name) and not is_hyperparameter(name))
        assert (part is Membership.free) <= (is_free(name) or name.startswith("model."))
