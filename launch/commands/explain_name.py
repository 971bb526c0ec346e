"""What is known of one name, as plain values: of a field, a section or group, or a choice."""

import difflib
from collections.abc import Sequence
from typing import Any

from regrow.errors import ConfigError
from regrow.launch.config.catalog import Catalog, Entry, Group, walk
from regrow.launch.config.choices import Choice
from regrow.launch.config.identity import membership
from regrow.launch.config.schema_docs import REQUIRED, summary_of

__all__ = ["explain_all", "explain_name"]

# Below it a name is another one, not a misspelt one.
_NEAR = 0.7
# What a choice's own explanation leaves out.
_OF_OTHER_CHOICES = ("schema_defaults", "set_by", "only_with", "only_with_words")
# So many choices are named one by one.
_FEW = 3


def explain_name(catalog: Catalog, name: str) -> list[dict[str, Any]]:
    """One or, where a field's last part is given alone, several explanations; each says its `kind`.

    Args:
        catalog: what there is.
        name: of a field (`optimizer.lr`, `lr`), a section or group (`checkpoint`, `hook`), or a choice
            (`model=llama3_8b`, `hook/evaluation`).

    Raises:
        ConfigError: nothing has that name; the nearest names are in it.
    """
    choice = _choice(catalog, name)
    if choice is not None:
        return [_explain_choice(catalog, choice)]
    if name in catalog.groups:
        return [_explain_group(catalog, catalog.groups[name])]
    entry = catalog.find(name)
    if entry is not None:
        below = [e for n, e in catalog.entries.items() if n.startswith(f"{name}.")]
        return [_explain_field(catalog, e) for e in (entry, *below)]
    found = [e for n, e in catalog.entries.items() if n.rpartition(".")[2] == name]
    if found:
        return [_explain_field(catalog, e) for e in found]
    raise ConfigError(_unknown(catalog, name))


def explain_all(catalog: Catalog) -> list[dict[str, Any]]:
    """Every section and group with all its fields.

    Args:
        catalog: what there is.
    """
    return [
        *(_explain_field(catalog, catalog.entries[f.name]) for f in catalog.root.fields if f.name in catalog.entries),
        *(_explain_group(catalog, group) for group in catalog.groups.values()),
    ]


def _choice(catalog: Catalog, name: str) -> Choice | None:
    group, sign, choice = name.rpartition("=") if "=" in name else name.rpartition("/")
    known = catalog.groups.get(group)
    return known.choices.get(choice) if sign and known is not None else None


def _unknown(catalog: Catalog, name: str) -> str:
    group, sign, choice = name.rpartition("=") if "=" in name else name.rpartition("/")
    known = catalog.groups.get(group)
    if sign and known is not None:
        near = difflib.get_close_matches(choice, known.choices, 3, 0.5) or list(known.choices)
        return f"{name} is no choice; {group} has {', '.join(near)}"
    names = [*catalog.entries, *catalog.groups]
    near = _nearest(name, names)
    remedy = f"did you mean {' or '.join(near)}?" if near else "regrow explain lists all"
    return f"{name} is no field, section, group or choice; {remedy}"


def _nearest(name: str, names: Sequence[str]) -> list[str]:
    """The names that are about as similar to one as the most similar one is; the last parts alone count too."""
    scores = {
        n: max(_likeness(name, n), 0.95 * _likeness(name.rpartition(".")[2], n.rpartition(".")[2])) for n in names
    }
    best = max(scores.values(), default=0.0)
    return sorted((n for n, s in scores.items() if s >= max(_NEAR, best - 0.03)), key=lambda n: -scores[n])[:4]


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def _explain_field(catalog: Catalog, entry: Entry) -> dict[str, Any]:
    doc = entry.doc
    value, file = catalog.default_of(entry.name)
    defaults = catalog.schema_defaults(entry)
    explained: dict[str, Any] = {
        "kind": "field",
        "name": entry.name,
        "meaning": doc.meaning,
        "type": doc.type_words,
        "choices": [{"name": name, "meaning": meaning} for name, meaning in doc.members],
        "belongs_to": membership(entry.name).value,
        "has_fields": doc.section is not None,
    }
    if doc.section is None:
        is_class = entry.name.endswith("._target_")
        required = value == REQUIRED and all(d == REQUIRED for d in defaults.values()) and not is_class
        explained |= {"required": required, "default": value, "default_set_by": file or None}
        if value == REQUIRED:
            explained["default"] = None
        explained["in_default_config"] = value != REQUIRED
        explained["schema_defaults"] = {k: v for k, v in defaults.items() if v not in (value, REQUIRED)}
        explained["set_by"] = catalog.set_by(entry)
    if entry.group != "hook" and all(v.schemas for v in entry.variants):
        owners = _owners(catalog, entry)
        explained["only_with"] = [name for names in owners.values() for name in names]
        explained["only_with_words"] = _owners_words(catalog.groups[entry.group], owners)
    entries = next((g for g in catalog.groups.values() if g.place == f"{entry.name}.NAME"), None)
    if entries is not None:
        explained["entries_of"] = {"group": entries.name, "choices": list(entries.choices)}
    others = [(v.schemas, v.doc.meaning) for v in entry.variants[1:] if v.doc.meaning != doc.meaning]
    if others:
        explained["other_meanings"] = {n.removesuffix("_schema"): m for names, m in others for n in names}
    return explained


def _owners(catalog: Catalog, entry: Entry) -> dict[str, list[str]]:
    """The choices that have a field, by their schemas."""
    group = catalog.groups[entry.group]
    found = {}
    for schema in (name for v in entry.variants for name in v.schemas):
        kind = group.schemas.get(schema)
        names = (
            [c.name for c in group.choices.values() if catalog.kind_of(c) is kind] if kind is not None else [schema]
        )
        found[schema.removesuffix("_schema")] = names
    return found


def _owners_words(group: Group, owners: dict[str, list[str]]) -> str:
    """In few words: all but these, or these, or the choices of a schema."""
    others = [c for c in group.choices if not any(c in names for names in owners.values())]
    if len(others) == 1 and len(group.choices) > _FEW:
        return f"every choice but {group.name}={others[0]}"
    words = []
    for schema, names in owners.items():
        shown = names if len(names) <= _FEW else [f"{schema}_… ({len(names)} choices)"]
        words += [f"{group.name}={name}" for name in shown]
    return ", ".join(words)


def _explain_group(catalog: Catalog, group: Group) -> dict[str, Any]:
    fields = [e for e in catalog.entries.values() if e.group == group.name]
    if group.name in catalog.entries:
        fields.insert(0, catalog.entries[group.name])
    return {
        "kind": "group" if group.choices else "section",
        "name": group.name,
        "meaning": group.summary,
        "place": group.place,
        "chosen": catalog.chosen.get(group.name),
        "choices": [{"name": c.name, "meaning": c.comment} for c in group.choices.values()],
        "fields": [_explain_field(catalog, e) for e in fields],
    }


def _explain_choice(catalog: Catalog, choice: Choice) -> dict[str, Any]:
    kind, group = catalog.kind_of(choice), catalog.groups[choice.group]
    values = {k: v for k, v in catalog.values_of(choice).items() if not isinstance(v, dict)}
    place = group.place.replace("NAME", choice.name) if group.name == "hook" else group.place
    prefix = "" if choice.is_global or not place else f"{place}."
    own_defaults = {name: doc.default for name, doc in walk(kind)} if kind is not None else {}
    fields: list[dict[str, Any]] = []
    for entry in _fields_of(catalog, group, choice, kind):
        inside = entry.name.removeprefix(f"{place}.").removeprefix(f"{group.place}.")
        field = _explain_field(catalog, entry) | {"name": f"{place}.{inside}"}
        if inside in values:
            field |= {"default": values[inside], "default_set_by": choice.file, "required": False}
            field["in_default_config"] = True
        elif kind is not None and not field["has_fields"]:
            default = own_defaults.get(inside, REQUIRED)
            field |= {"default": None if default == REQUIRED else default, "default_set_by": None}
            field |= {"required": default == REQUIRED, "in_default_config": True}
        fields.append({k: v for k, v in field.items() if k not in _OF_OTHER_CHOICES})
    return {
        "kind": "choice",
        "name": f"{choice.group}={choice.name}",
        "meaning": choice.comment,
        "file": choice.file,
        "how": _how_to_choose(catalog, group, choice),
        "about": summary_of(kind) if kind is not None else "",
        "adds": [f"{group}: {name}" for group, name in choice.adds],
        "sets": {f"{prefix}{name}": value for name, value in values.items()},
        "fields": fields,
    }


def _how_to_choose(catalog: Catalog, group: Group, choice: Choice) -> str:
    if group.name == "hook" and choice.name in catalog.default_hooks():
        return f"In every run, unless hooks.{choice.name}.enabled=false leaves it out."
    if "NAME" not in group.place:
        return f"regrow {group.name}={choice.name}"
    place = group.place.replace("NAME", choice.name) if group.name == "hook" else group.place
    return f"regrow +{group.name}@{place}={choice.name}"


def _fields_of(catalog: Catalog, group: Group, choice: Choice, kind: type[Any] | None) -> list[Entry]:
    """Those that a choice's schema has."""
    if kind is None:
        return []
    place = group.place.replace("NAME", choice.name) if group.name == "hook" else group.place
    names = [f"{place}.{name}" for name, _ in walk(kind)]
    return [entry for name in names if (entry := catalog.find(name)) is not None]
