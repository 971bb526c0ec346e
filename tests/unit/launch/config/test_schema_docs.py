"""The parser of schemas' docstrings."""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import II, MISSING

from regrow.launch.config.schema_docs import REQUIRED, attribute_texts, describe_schema, summary_of


class Colour(Enum):
    """A colour.

    Attributes:
        red: of blood;
            and of roses.
        blue: of the sky.
    """

    red = "r"
    blue = "b"


@dataclass(kw_only=True, slots=True)
class Inner:
    """What is inside.

    Attributes:
        depth: in metres.
    """

    depth: float = 1.5


@dataclass(kw_only=True, slots=True)
class Base:
    """What all have,
    in two lines.

    Attributes:
        width: of the base.
        left, right: how far
            it reaches.

    Not a part of the list:
        width: another text.
    """

    width: int = MISSING
    left: int = 1
    right: int | None = None


@dataclass(kw_only=True, slots=True)
class Whole(Base):
    """One kind.

    Attributes:
        width: of the whole.
        colours: see there.
        inner: a section.
        others: sections by name.
        rows: sections in a list.
        link: another field.
        either: several types.
    """

    colours: list[Colour] = field(default_factory=lambda: [Colour.blue])
    inner: Inner = field(default_factory=Inner)
    others: dict[str, Inner] = field(default_factory=dict)
    rows: list[Inner] = field(default_factory=list)
    link: str = II("width")
    either: bool | int | str = "auto"
    silent: dict[str, int] = field(default_factory=dict)


@dataclass
class Undocumented:
    value: int = 0


class Bare(Enum):
    a = "a"


def test_meanings_are_inherited_and_may_be_said_anew() -> None:
    doc = describe_schema(Whole)
    assert doc.summary == "One kind."
    assert (doc["width"].meaning, describe_schema(Base)["width"].meaning) == ("of the whole.", "of the base.")
    assert doc["left"].meaning == doc["right"].meaning == "how far it reaches."
    assert doc["silent"].meaning == ""
    assert [f.name for f in doc.fields][:4] == ["width", "left", "right", "colours"]


def test_what_python_writes_itself_is_no_meaning() -> None:
    assert summary_of(Undocumented) == ""
    assert summary_of(Bare) == ""
    assert summary_of(Base) == "What all have, in two lines."


def test_enums_say_what_their_members_are() -> None:
    assert attribute_texts(Colour) == {"red": "of blood; and of roses.", "blue": "of the sky."}
    assert describe_schema(Whole)["colours"].members == (
        ("red", "of blood; and of roses."),
        ("blue", "of the sky."),
    )


def test_types_are_in_words() -> None:
    doc = describe_schema(Whole)
    assert {f.name: f.type_words for f in doc.fields} == {
        "width": "whole number",
        "left": "whole number",
        "right": "whole number or null",
        "colours": "list of values, each one of red, blue",
        "inner": "section",
        "others": "mapping from names to sections",
        "rows": "list of sections",
        "link": "text",
        "either": "true or false, whole number or text",
        "silent": "mapping from names to whole numbers",
    }


def test_defaults_are_plain_values() -> None:
    doc = describe_schema(Whole)
    assert doc["width"].default == REQUIRED
    assert doc["colours"].default == ["blue"]
    assert doc["inner"].default == {"depth": 1.5}
    assert doc["link"].default == "${width}"


def test_sections_are_found_in_lists_and_mappings() -> None:
    doc = describe_schema(Whole)
    assert [(f.name, f.per_entry, f.named) for f in doc.fields if f.section is Inner] == [
        ("inner", False, False),
        ("others", True, True),
        ("rows", True, False),
    ]
