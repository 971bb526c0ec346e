"""Schemas of mixtures: several sources by weight, in stages."""

import dataclasses
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from omegaconf import MISSING

from regrow.trainer.data.config import (
    ChatConfig,
    ChatFields,
    DataConfig,
    Packing,
    SourcePart,
    StdlibConfig,
    TextConfig,
    TextFields,
    TokensConfig,
)

__all__ = [
    "ChatPart",
    "MixtureConfig",
    "OnExhausted",
    "StageConfig",
    "StdlibPart",
    "TextPart",
    "TokensPart",
]


class OnExhausted(Enum):
    """What happens where a source would be read more than its `max_epochs`.

    Attributes:
        refuse: the run is refused before it starts.
        reweight: the source is left out from there on; the others keep their ratios.
    """

    refuse = "refuse"
    reweight = "reweight"


@dataclass(kw_only=True, slots=True)
class TextPart(TextFields, SourcePart):
    """Files of text, as a source of a mixture."""

    SCHEMA: ClassVar[tuple[str, str]] = ("data_source", "text_schema")
    CONFIG: ClassVar[type[DataConfig]] = TextConfig


@dataclass(kw_only=True, slots=True)
class ChatPart(ChatFields, SourcePart):
    """Files of conversations, as a source of a mixture."""

    SCHEMA: ClassVar[tuple[str, str]] = ("data_source", "chat_schema")
    CONFIG: ClassVar[type[DataConfig]] = ChatConfig
    packing: Packing | None = Packing.best_fit


@dataclass(kw_only=True, slots=True)
class TokensPart(SourcePart):
    """A folder made by `regrow-data tokenize`, as a source of a mixture.

    Attributes:
        path: the folder that `regrow-data tokenize` wrote.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("data_source", "tokens_schema")
    CONFIG: ClassVar[type[DataConfig]] = TokensConfig
    path: str = MISSING


@dataclass(kw_only=True, slots=True)
class StdlibPart(SourcePart):
    """The running Python's own standard library, as a source of a mixture."""

    SCHEMA: ClassVar[tuple[str, str]] = ("data_source", "stdlib_schema")
    CONFIG: ClassVar[type[DataConfig]] = StdlibConfig


@dataclass(kw_only=True, slots=True)
class StageConfig:
    """Other weights from a place of the run on.

    Attributes:
        from_step: optimizer steps before it; null where `from_tokens` says it.
        from_tokens: tokens trained on before it; null where `from_step` says it.
        weights: weight of each source; those that are not named are left out.
    """

    from_step: int | None = None
    from_tokens: int | None = None
    weights: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class MixtureConfig(DataConfig):
    """Several sources. Which sample is of which is arithmetic: every stretch of a stage that begins where the stage
    does is within one sample of its weights.

    Attributes:
        sources: what is mixed, by a name of your choice.
        stages: other weights later on, in ascending order.
        on_exhausted: what happens where a source's `max_epochs` end.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("data", "mixture_schema")
    _target_: str = "regrow.trainer.data.mixture_source.MixtureSource"
    sources: dict[str, SourcePart] = dataclasses.field(default_factory=dict)
    stages: list[StageConfig] = dataclasses.field(default_factory=list)
    on_exhausted: OnExhausted = OnExhausted.refuse
