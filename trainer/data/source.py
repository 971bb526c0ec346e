"""What a source of text is. Sources run in tokenising processes too, so nothing here imports torch."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, final

from tokenizers import Tokenizer

from regrow.trainer.data.config import DataConfig
from regrow.trainer.data.encoding import DocumentMarks, Encoded, encode_documents
from regrow.trainer.data.errors import DataError as DataError
from regrow.trainer.data.errors import digest as digest
from regrow.trainer.data.errors import shown as shown

__all__ = ["CorpusPart", "CorpusSource", "DataError", "Notes", "Source", "digest", "shown"]


@dataclass(frozen=True, slots=True)
class CorpusPart:
    """A part of a corpus that one process tokenises at a time; becomes one shard.

    Attributes:
        path: a file.
        start: first byte, or row group, or item.
        stop: one past the last; -1 is the end.
    """

    path: str
    start: int = 0
    stop: int = -1


@final
class Notes:
    """What was passed over or replaced while documents were read.

    Attributes:
        counts: how often, and where first, by what it was.
    """

    def __init__(self) -> None:
        self.counts: dict[str, tuple[int, str]] = {}

    def add(self, what: str, where: Callable[[], str]) -> None:
        """Counts one; `where` is asked for the first of its kind only."""
        count, first = self.counts.get(what, (0, ""))
        self.counts[what] = (count + 1, first or where())

    def merge(self, counts: dict[str, tuple[int, str]]) -> None:
        """Adds what another process counted."""
        for what, (count, where) in counts.items():
            before, first = self.counts.get(what, (0, where))
            self.counts[what] = (before + count, first)


class Source(ABC):
    """Where documents come from. Made from its config alone, in the launcher and in tokenising processes."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.notes = Notes()

    @abstractmethod
    def check(self) -> None:
        """Raises DataError or FileNotFoundError, in one sentence, for what can be told without reading."""

    def children(self) -> dict[str, DataConfig]:
        """The configs of the sources that this one is made of, by name; empty where it has documents of its own."""
        return {}

    def prepared(self) -> Path | None:
        """A token store that exists already; None: a `CorpusSource` has to be tokenised."""
        return None


class CorpusSource(Source):
    """A source of documents.

    Attributes:
        HAS_LABELS: its documents say which of their tokens are labels.
    """

    HAS_LABELS: ClassVar[bool] = False

    @abstractmethod
    def units(self) -> list[CorpusPart]:
        """The corpus in parts, in a fixed order.

        Raises:
            DataError: the beginning of a file shows that it cannot be read.
        """

    @abstractmethod
    def read(self, unit: CorpusPart) -> Iterator[str]:
        """The documents of one part, in a fixed order; what is not taken as it stands goes to `self.notes`.

        Raises:
            DataError: naming the file and the line or row.
        """

    def encode(self, unit: CorpusPart, tokenizer: Tokenizer, marks: DocumentMarks) -> Iterator[Encoded]:
        """The documents of one part as ids.

        Args:
            unit: the part.
            tokenizer: makes them.
            marks: what stands around each document of text.

        Raises:
            DataError: see `read`; or the tokenizer fails.
        """
        return encode_documents(self.read(unit), tokenizer, marks)

    @abstractmethod
    def key(self) -> dict[str, str]:
        """Everything that decides the documents, by the name that a message gives it: the corpus' content, and each
        option of reading it.
        """
