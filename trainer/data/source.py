"""What a source of text is. Sources run in tokenising processes too, so nothing here imports torch."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer.data.config import DataConfig

__all__ = ["Source", "TextUnits", "Unit"]


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of a corpus that one process tokenises at a time; becomes one shard.

    Attributes:
        path: a file.
        start: first byte, or row group, or item.
        stop: one past the last; -1 is the end.
    """

    path: str
    start: int = 0
    stop: int = -1


class Source(ABC):
    """Where documents come from. Made from its config alone, in the launcher and in tokenising processes."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config

    @abstractmethod
    def check(self) -> None:
        """Raises ValueError or FileNotFoundError, in one sentence, for what can be told without reading."""

    def prepared(self) -> Path | None:
        """A token store that exists already; None: `TextUnits` have to be tokenised."""
        return None


class TextUnits(Source):
    """A source of text."""

    @abstractmethod
    def units(self) -> list[Unit]:
        """The corpus in parts, in a fixed order."""

    @abstractmethod
    def read(self, unit: Unit) -> Iterator[str]:
        """The documents of one part, in a fixed order."""

    @abstractmethod
    def key(self) -> str:
        """Changes when the corpus or the way it is read does; from names, sizes and times, not from bytes."""


def digest(*parts: str) -> str:
    """A short name for a combination of strings."""
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()
