"""Every field, section and group of the config with what is known of it, for help and for errors. Needs no Hydra.

Fields are known by the names that they are set by, with `NAME` where a user chooses one:
`checkpoint.save_policies.NAME.minutes`.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from regrow.launch.config.choices import Choice
from regrow.launch.config.schema_docs import REQUIRED, FieldDoc, SchemaDoc, describe_schema

__all__ = ["PLACES", "Catalog", "Entry", "Group", "Variant", "flat", "walk"]

# Groups whose choices are entries of a section, and the name that a user gives such an entry.
PLACES = {
    "hook": "hooks.NAME",
    "save_policy": "checkpoint.save_policies.NAME",
    "retention_rule": "checkpoint.retention_rules.NAME",
    "data_source": "data.sources.NAME",
}
# Sections whose entries are those of another place too.
_ALSO = {"data.validation_sets.NAME": "data.sources.NAME"}


@dataclass(frozen=True, slots=True)
class Variant:
    """A field as some of its section's choices have it.

    Attributes:
        schemas: the names of their schemas; empty for all of the section.
        doc: the field.
    """

    schemas: tuple[str, ...]
    doc: FieldDoc


@dataclass(frozen=True, slots=True)
class Entry:
    """One field by its full name.

    Attributes:
        name: dotted.
        group: whose choices it belongs to; empty where there is none.
        variants: as its group's schemas have it; the first is the most general.
    """

    name: str
    group: str
    variants: tuple[Variant, ...]

    @property
    def doc(self) -> FieldDoc:
        """As most of them have it."""
        return self.variants[0].doc


@dataclass(frozen=True, slots=True)
class Group:
    """A group of choices, or a section without any.

    Attributes:
        name: for instance `model`, `hook`, `train`.
        place: the dotted name of what a choice's fields stand in; empty for the root.
        summary: what it is.
        base: what all its choices have; None where they have nothing in common.
        schemas: by their names in the group, in order.
        choices: by name.
    """

    name: str
    place: str
    summary: str
    base: type[Any] | None
    schemas: Mapping[str, type[Any]]
    choices: Mapping[str, Choice]


class Catalog:
    """What there is to set.

    Args:
        root: the root schema.
        schemas: all others by (group, name).
        choices: the YAML files by group; the root config is `""`, `config`.
    """

    def __init__(
        self,
        root: type[Any],
        schemas: Mapping[tuple[str, str], type[Any]],
        choices: Mapping[str, Mapping[str, Choice]],
    ) -> None:
        self._root = describe_schema(root)
        self._schemas: dict[str, dict[str, type[Any]]] = {}
        for (group, name), kind in schemas.items():
            self._schemas.setdefault(group, {})[name] = kind
        self._choices = choices
        config = choices.get("", {}).get("config")
        self._values: Mapping[str, Any] = config.values if config is not None else {}
        self.chosen: dict[str, str] = {
            k.removeprefix("/"): v for k, v in (config.adds if config is not None else ()) if "override" not in k
        }
        self.groups: dict[str, Group] = {g.name: g for g in self._groups()}
        self.entries: dict[str, Entry] = {e.name: e for e in self._entries()}

    def default_hooks(self) -> set[str]:
        """The hooks of a run that chooses none."""
        found: set[str] = set()
        waiting = [self.chosen.get("hooks", "")]
        while waiting:
            choice = self._choices.get("hooks", {}).get(waiting.pop())
            if choice is not None:
                found |= {name for group, name in choice.adds if group.startswith("/hook@")}
                waiting += choice.bases
        return found

    @property
    def root(self) -> SchemaDoc:
        """The root schema: sections, and the few fields that stand outside of any."""
        return self._root

    def _groups(self) -> Iterator[Group]:
        for field in self._root.fields:
            if field.section is not None and not field.per_entry:
                yield self._group(field.name, field.name, field.meaning, field.section)
        for name, place in PLACES.items():
            holder = self._holder(place)
            base = holder.section if holder is not None else None
            yield self._group(name, place, f"entries of {place.removesuffix('.NAME')}", base)
        known = {f.name for f in self._root.fields if f.section is not None and not f.per_entry} | PLACES.keys()
        for name in sorted((self._choices.keys() | self._schemas.keys()) - known - {""}):
            field_doc = next((f for f in self._root.fields if f.name == name), None)
            summary = _FURTHER.get(name, field_doc.meaning if field_doc is not None else "")
            place = "" if name in _GLOBAL else name.replace("/", ".")
            yield self._group(name, place, summary, None)

    def _group(self, name: str, place: str, summary: str, base: type[Any] | None) -> Group:
        return Group(name, place, summary, base, self._schemas.get(name, {}), self._choices.get(name, {}))

    def _holder(self, place: str) -> FieldDoc | None:
        """The field that holds a place's entries, in whichever schema of its section."""
        section, _, name = place.removesuffix(".NAME").rpartition(".")
        if not section:
            return next((f for f in self._root.fields if f.name == name), None)
        kinds = [f.section for f in self._root.fields if f.name == section and f.section is not None]
        kinds += self._schemas.get(section, {}).values()
        return next((f for kind in kinds for f in describe_schema(kind).fields if f.name == name), None)

    def _entries(self) -> Iterator[Entry]:
        for field in self._root.fields:
            if field.section is None:
                yield Entry(field.name, "", (Variant((), field),))
        for group in self.groups.values():
            own_place = group.place.startswith("hooks.")
            for schema, kinds in self._kinds(group, apart=own_place):
                place = group.place.replace("NAME", schema) if own_place and schema else group.place
                seen = self._fields(group, {}) if own_place and schema else {}
                for name, variants in self._fields(group, kinds).items():
                    if name not in seen:
                        yield Entry(f"{place}.{name}", group.name, tuple(variants))

    def _kinds(self, group: Group, *, apart: bool) -> Iterator[tuple[str, dict[str, type[Any]]]]:
        """(choice, schemas) to list together: all of a group, or one after the other where each has its own place."""
        if not apart:
            yield "", dict(group.schemas)
            return
        yield "", {}
        for choice, kind in self._by_choice(group).items():
            yield choice, {choice: kind}

    def _by_choice(self, group: Group) -> dict[str, type[Any]]:
        by_schema = {c.schema: c.name for c in reversed(list(group.choices.values())) if c.schema}
        return {by_schema.get(s, s.removesuffix("_schema")): kind for s, kind in group.schemas.items()}

    def _fields(self, group: Group, kinds: Mapping[str, type[Any]]) -> dict[str, list[Variant]]:
        found: dict[str, list[Variant]] = {}
        if group.base is not None:
            for name, doc in walk(group.base):
                found[name] = [Variant((), doc)]
        for schema, kind in kinds.items():
            for name, doc in walk(kind):
                variants = found.setdefault(name, [])
                if not any(not v.schemas and v.doc.meaning == doc.meaning for v in variants):
                    _add(variants, schema, doc)
        return found

    def find(self, name: str) -> Entry | None:
        """A field by the name that it is set by, whatever an entry is called.

        Args:
            name: dotted; an entry of a place (`hooks.evaluation.enabled`) may have any name.
        """
        name = re.sub(r"\.\d+(?=\.)", ".N", name)
        for also, place in _ALSO.items():
            section = also.removesuffix("NAME")
            if name.startswith(section):
                name = f"{place.removesuffix('NAME')}{name.removeprefix(section)}"
        if name in self.entries:
            return self.entries[name]
        for place in PLACES.values():
            section = place.removesuffix("NAME")
            _, _, rest = name.removeprefix(section).partition(".")
            if name.startswith(section) and rest and f"{place}.{rest}" in self.entries:
                return dataclasses.replace(self.entries[f"{place}.{rest}"], name=name)
        return None

    def values_of(self, choice: Choice) -> dict[str, Any]:
        """What a choice's YAML sets, with those that it goes on from.

        Args:
            choice: of any group.
        """
        values: dict[str, Any] = {}
        for base in choice.bases:
            parent = self._choices.get(choice.group, {}).get(base)
            values |= self.values_of(parent) if parent is not None and parent is not choice else {}
        return values | flat(choice.values)

    def kind_of(self, choice: Choice) -> type[Any] | None:
        """The schema of a choice, by its YAML's defaults or by those that it goes on from.

        Args:
            choice: of any group.
        """
        found = self._schemas.get(choice.group, {}).get(choice.schema)
        parents = (self._choices.get(choice.group, {}).get(b) for b in choice.bases)
        return found or next((k for p in parents if p and p is not choice and (k := self.kind_of(p))), None)

    def default_of(self, name: str) -> tuple[Any, str]:
        """(value, file that sets it) in the config that no override changes; no file where the schema does.

        Args:
            name: as `find` takes it.

        Returns:
            `REQUIRED` and no file where the default choices do not have the field.
        """
        rooted = flat(self._values)
        if name in rooted:
            return rooted[name], "conf/config.yaml"
        entry = self.find(name)
        if entry is None:
            return REQUIRED, ""
        group = self.groups.get(entry.group)
        if group is None or not group.place:
            return entry.doc.default, ""
        inside = name.removeprefix(f"{group.place}.")
        choice = group.choices.get(self.chosen.get(group.name, ""))
        if "NAME" in group.place:
            own, _, inside = name.removeprefix(group.place.removesuffix("NAME")).partition(".")
            choice = group.choices.get(own)
        if choice is not None and inside in (values := self.values_of(choice)):
            return values[inside], choice.file
        kind = self.kind_of(choice) if choice is not None else group.base
        doc = dict(walk(kind)).get(inside) if kind is not None else None
        return (doc.default, "") if doc is not None else (REQUIRED, "")

    def schema_defaults(self, entry: Entry) -> dict[str, Any]:
        """The defaults of its group's schemas that have a field, by the schemas' names.

        Args:
            entry: the field.
        """
        group = self.groups.get(entry.group)
        if group is None or not entry.name.startswith(f"{group.place}.") or group.name == "hook":
            return {}
        inside = entry.name.removeprefix(f"{group.place}.")
        given = {name.removesuffix("_schema"): dict(walk(kind)) for name, kind in group.schemas.items()}
        return {name: docs[inside].default for name, docs in given.items() if inside in docs}

    def set_by(self, entry: Entry) -> dict[str, Any]:
        """The choices of its group that set a field, with their values.

        Args:
            entry: the field.
        """
        group = self.groups.get(entry.group)
        if group is None or "NAME" in group.place:
            return {}
        inside = entry.name.removeprefix(f"{group.place}.")
        given = {c.name: self.values_of(c) for c in group.choices.values()}
        return {name: values[inside] for name, values in given.items() if inside in values}


# What YAML files alone say nothing of.
_FURTHER = {
    "experiment": "a whole command in a file: sets any fields and chooses for any groups",
    "hooks": "which optional hooks a run has",
    "logger": "where metrics go beside metrics.jsonl",
    "hydra/launcher": "where the runs of a sweep are started",
}
_GLOBAL = ("experiment", "logger", "hooks")


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted names, each mapping under its own name too.

    Args:
        values: of a YAML file.
        prefix: of the names.
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        found[f"{prefix}{key}"] = value
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
    return found


def walk(kind: type[Any], prefix: str = "") -> Iterator[tuple[str, FieldDoc]]:
    """(name within the section, field) of a schema and of the sections in it.

    Args:
        kind: the schema.
        prefix: of the names.
    """
    for doc in describe_schema(kind).fields:
        yield f"{prefix}{doc.name}", doc
        is_elsewhere = isinstance(doc.default, str) and doc.default != REQUIRED
        if doc.section is None or is_elsewhere or f"{prefix}{doc.name}" in _ELSEWHERE:
            continue
        yield from walk(
            doc.section, f"{prefix}{doc.name}." + ("" if not doc.per_entry else "NAME." if doc.named else "N.")
        )


# What groups of their own describe.
_ELSEWHERE = {place.removesuffix(".NAME").partition(".")[2] for place in (*PLACES.values(), *_ALSO)} - {""}


def _add(variants: list[Variant], schema: str, doc: FieldDoc) -> None:
    """Schemas that say the same of a field are one variant, whatever their defaults are."""
    for i, other in enumerate(variants):
        if other.schemas and (other.doc.meaning, other.doc.type_words) == (doc.meaning, doc.type_words):
            variants[i] = dataclasses.replace(other, schemas=(*other.schemas, schema))
            return
    variants.append(Variant((schema,), doc))
