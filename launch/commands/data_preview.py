"""`regrow-data preview`: the samples that a run would read, decoded.

A token is a label where the model is asked for it. Each is shown once: as what the position before it is asked for,
or, where a sample or a packed document begins, as the first token that is read, for which nothing asks.
"""

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.text import Text
from tokenizers import Tokenizer

from regrow.launch.commands.data_run import prepare_run_data
from regrow.launch.config.schema import Config
from regrow.trainer.data.packed_windows import PackedWindows
from regrow.trainer.data.samples import SampleIds, Samples
from regrow.trainer.data.source import DataError
from regrow.trainer.data.tokenizer import load_tokenizer
from regrow.trainer.data.windows import IGNORE, Windows

__all__ = ["Part", "Preview", "as_plain", "as_text", "preview", "print_preview"]

Int64s = npt.NDArray[np.int64]
# Joins letters in scripts and emoji; all other characters without a shape are shown by their numbers.
_JOINERS = "\u200c\u200d"


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a sample.

    Attributes:
        text: of its tokens.
        counts: whether they are labels.
        begins: a document begins here; "" where it does not.
    """

    text: str
    counts: bool
    begins: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preview:
    """A sample.

    Attributes:
        head: which sample it is, in words.
        parts: what it holds, in order.
    """

    head: str
    parts: list[Part]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """Tokens that are alike: of one document, and all of them labels or none.

    Attributes:
        ids: the tokens.
        counts: whether they are labels.
    """

    ids: list[int]
    counts: bool


def preview(config: Config, *, first: int, count: int) -> Iterator[Preview]:
    """Samples of a run, whose data is prepared for it.

    Args:
        config: of the run.
        first: samples of the run before the first one that is shown.
        count: how many; fewer where the run ends.

    Raises:
        Refused: in the sentence that the run would give.
        DataError: there are no such samples.
    """
    if count < 1:
        raise DataError(f"--count must be at least 1, but is {count}; use 3")
    run = prepare_run_data(config)
    if not 0 <= first < run.count:
        raise DataError(
            f"--first must be from 0 to {run.count - 1}, the last sample of train.steps={config.train.steps}, "
            f"but is {first}; use another one, or more steps"
        )
    tokenizer, samples = load_tokenizer(run.corpus.tokenizer_file), run.samples()
    ids = samples.ids(first, min(count, run.count - first))
    for place in range(len(ids)):
        sample = ids[place]
        name = samples.names[int(sample.sources[0])]
        yield _preview(tokenizer, samples, sample, f"sample {first + place:,}: source {name}", run.windows[name])


def _preview(tokenizer: Tokenizer, samples: Samples, sample: SampleIds, name: str, windows: Windows) -> Preview:
    tokens, labels, documents = (np.empty(samples.seq_len, dtype=np.int64) for _ in range(3))
    samples.read(sample, tokens, labels, documents)
    window = int(sample.windows[0])
    packed = isinstance(windows, PackedWindows)
    filled, begins = _pieces(windows, window) if isinstance(windows, PackedWindows) else (samples.seq_len, [""])
    head = (
        f"{name}, window {window:,} of {len(windows):,}, {100 * filled / samples.seq_len:.4g} % filled, "
        f"{np.count_nonzero(labels != IGNORE):,} labels"
    )
    parts: list[Part] = []
    bounds = [0, *(1 + np.flatnonzero(np.diff(documents[:filled]))).tolist(), filled]
    for number, (start, stop) in enumerate(pairwise(bounds)):
        runs = _runs(tokens, labels, start, stop, joined=not packed, last=stop == filled)
        mark = begins[number] if number < len(begins) else "document"
        for i, text in enumerate(_texts(tokenizer, runs)):
            parts.append(Part(text, runs[i].counts, mark if i == 0 else ""))
    return Preview(head=head, parts=parts)


def _pieces(windows: PackedWindows, window: int) -> tuple[int, list[str]]:
    """Positions that a packed window uses, and how each of its pieces begins."""
    packed = windows.packed
    begin, end = packed.window_starts[window : window + 2].tolist()
    firsts = packed.firsts[begin:end].tolist()
    return int(packed.positions[begin:end].sum()), [
        "document" if not first else f"document, from its token {first:,} on" for first in firsts
    ]


def _runs(tokens: Int64s, labels: Int64s, start: int, stop: int, *, joined: bool, last: bool) -> list[_Run]:
    """A document's tokens in a sample.

    Args:
        tokens: of the sample.
        labels: of the sample.
        start: the document's first position.
        stop: one past its last.
        joined: the token after each position is its label, across documents too.
        last: no other document comes after it.
    """
    ids = tokens[start:stop].tolist()
    asked = [joined and start > 0, *(labels[start : stop - 1] != IGNORE).tolist()]
    # What the last position is asked for is no token of this document's positions.
    if (last or not joined) and labels[stop - 1] != IGNORE:
        ids.append(int(labels[stop - 1]))
        asked.append(True)
    bounds = [0, *(1 + np.flatnonzero(np.diff(asked))).tolist(), len(ids)]
    return [_Run(ids=ids[a:b], counts=bool(asked[a])) for a, b in pairwise(bounds)]


def _texts(tokenizer: Tokenizer, runs: list[_Run]) -> Iterator[str]:
    """The text of each run: what it adds to the text before it, because decoders look at neighbours."""
    ids: list[int] = []
    before = ""
    for run in runs:
        ids += run.ids
        text = tokenizer.decode(ids, skip_special_tokens=False)
        yield _visible(_added(before, text))
        before = text


def _added(before: str, after: str) -> str:
    """What comes after the common beginning; the bytes of a character may have been in two runs."""
    places = (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b)
    return after[next(places, len(before)) :]


def _visible(text: str) -> str:
    """The text without what would do something to a terminal."""
    return "".join(c if _is_harmless(c) else c.encode("unicode_escape").decode() for c in text)


def _is_harmless(character: str) -> bool:
    return character.isprintable() or character in f"\n\t{_JOINERS}" or unicodedata.category(character) == "Zs"


def as_plain(sample: Preview) -> str:
    """The sample with its marks in words."""
    out = f"=== {sample.head}\n"
    for part in sample.parts:
        if part.begins:
            out += f"{_line_before(out)}[{part.begins}]\n"
        out += part.text if part.counts else f"[no label: {part.text}]"
    return out


def as_text(sample: Preview) -> Text:
    """The sample in colours: labels as they are, other tokens dimmed."""
    text = Text()
    text.append(f"{sample.head}\n", style="bold")
    for part in sample.parts:
        if part.begins:
            text.append(f"{_line_before(text.plain)}[{part.begins}]\n", style="bold cyan")
        text.append(part.text, style="" if part.counts else "dim")
    return text


def _line_before(text: str) -> str:
    return "" if text.endswith("\n") else "\n"


def print_preview(config: Config, *, first: int, count: int) -> None:
    """Prints samples: in colours where the terminal has them, else with marks in words."""
    console = Console(highlight=False)
    coloured = console.is_terminal and console.color_system is not None and not console.no_color
    for sample in preview(config, first=first, count=count):
        if coloured:
            console.print(as_text(sample), soft_wrap=True, end="\n\n")
        else:
            print(as_plain(sample), end="\n\n")
