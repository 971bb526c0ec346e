"""`regrow-data show`: what a token store holds, counted."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from regrow.checkpoint.documents import DocumentError, read_document
from regrow.checkpoint.files import read_regular
from regrow.trainer.data.recipe import RECIPE, Recipe
from regrow.trainer.data.source import DataError, shown
from regrow.trainer.data.token_bytes import bytes_of_tokens
from regrow.trainer.data.token_store import TokenStore
from regrow.trainer.data.tokenizer import load_tokenizer
from regrow.trainer.data.windows import documents_of_split

__all__ = ["LengthBin", "StoreFigures", "count_store", "figures_text", "summary"]

_CHUNK_TOKENS = 1 << 20
_RECIPE_BYTES = 1 << 20
_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
_BAR = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthBin:
    """Documents of similar lengths.

    Attributes:
        shortest: tokens, a power of two.
        longest: tokens, one below the next.
        documents: how many.
        tokens: of these documents.
    """

    shortest: int
    longest: int
    documents: int
    tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreFigures:
    """What a store holds.

    Attributes:
        folder: where it is.
        made_with: what decided its tokens, by name; empty where an earlier version did not note it.
        shards: files of tokens.
        documents: in all.
        tokens: in all, with the one that ends each document.
        vocab_size: one more than the tokenizer's largest id.
        ids_used: how many ids occur.
        text_bytes: of the text that the tokens stand for; special tokens are none.
        bytes_per_token: on average.
        labels: tokens that are labels; None where the store does not say, and all are.
        length_quantiles: tokens of a document, by the share of documents that are as long or shorter.
        length_mean: tokens of a document.
        lengths: documents by powers of two.
        validation_fraction: `data.validation_fraction`.
        validation_documents: that it holds out.
        validation_tokens: in these.
        fingerprint: of the content.
    """

    folder: str
    made_with: dict[str, str]
    shards: int
    documents: int
    tokens: int
    vocab_size: int
    ids_used: int
    text_bytes: int
    bytes_per_token: float
    labels: int | None
    length_quantiles: dict[str, int]
    length_mean: float
    lengths: list[LengthBin]
    validation_fraction: float
    validation_documents: int
    validation_tokens: int
    fingerprint: str

    def as_json(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def count_store(folder: Path, validation_fraction: float) -> StoreFigures:
    """Reads a store once, a part at a time.

    Args:
        folder: of the store.
        validation_fraction: what a run would hold out.

    Raises:
        DataError: it is damaged or cannot be read, or the fraction is none.
        FileNotFoundError: there is none.
    """
    if not 0 <= validation_fraction < 1:
        raise DataError(
            f"--validation-fraction must be at least 0 and below 1, but is {validation_fraction:g}; use 0.05"
        )
    store = TokenStore(folder)
    index, lengths = store.index, store.lengths
    uses = _uses_of_ids(store)
    sizes = np.zeros(len(uses), dtype=np.int64)
    known = bytes_of_tokens(load_tokenizer(store.tokenizer_file))[: len(sizes)]
    sizes[: len(known)] = known
    text_bytes = int(uses @ sizes)
    held_out = documents_of_split(store, validation_fraction, validation=True)
    return StoreFigures(
        folder=str(folder),
        made_with=_made_with(folder),
        shards=index.shards,
        documents=index.documents,
        tokens=index.tokens,
        vocab_size=index.vocab_size,
        ids_used=int(np.count_nonzero(uses)),
        text_bytes=text_bytes,
        bytes_per_token=text_bytes / max(1, index.tokens),
        labels=_labels(store),
        length_quantiles=_quantiles(lengths),
        length_mean=index.tokens / max(1, index.documents),
        lengths=_bins(lengths),
        validation_fraction=validation_fraction,
        validation_documents=len(held_out),
        validation_tokens=int(lengths[held_out].sum()),
        fingerprint=index.fingerprint,
    )


def _chunks(store: TokenStore) -> Iterator[tuple[int, int]]:
    """All tokens as ranges that lie in one shard each and fit into memory."""
    starts = np.cumsum(store.lengths) - store.lengths
    firsts = starts[np.flatnonzero(np.diff(store.shard_of(starts), prepend=-1))]
    for first, end in zip(firsts.tolist(), [*firsts[1:].tolist(), store.index.tokens], strict=True):
        for start in range(first, end, _CHUNK_TOKENS):
            yield start, min(end, start + _CHUNK_TOKENS)


def _uses_of_ids(store: TokenStore) -> npt.NDArray[np.int64]:
    """How often each id occurs, int64 `(ids,)`."""
    uses = np.zeros(store.index.vocab_size, dtype=np.int64)
    buffer = np.empty(_CHUNK_TOKENS, dtype=np.int64)
    for start, stop in _chunks(store):
        chunk = buffer[: stop - start]
        store.read(start, chunk)
        uses += np.bincount(chunk, minlength=len(uses))
    return uses


def _labels(store: TokenStore) -> int | None:
    if store.labels is None:
        return None
    buffer, labels = np.empty(_CHUNK_TOKENS, dtype=np.bool_), 0
    for start, stop in _chunks(store):
        store.labels.read(start, buffer[: stop - start])
        labels += int(np.count_nonzero(buffer[: stop - start]))
    return labels


def _quantiles(lengths: npt.NDArray[np.int64]) -> dict[str, int]:
    """Lengths that documents have, not means of two."""
    if not len(lengths):
        return {}
    values = np.quantile(lengths, _QUANTILES, method="inverted_cdf").tolist()
    return {f"{share:g}": int(value) for share, value in zip(_QUANTILES, values, strict=True)}


def _bins(lengths: npt.NDArray[np.int64]) -> list[LengthBin]:
    """From the shortest document's power of two to the longest's."""
    if not len(lengths):
        return []
    powers = np.frexp(lengths)[1] - 1
    documents = np.bincount(powers)
    tokens = np.zeros(len(documents), dtype=np.int64)
    np.add.at(tokens, powers, lengths)
    return [
        LengthBin(
            shortest=1 << power,
            longest=(2 << power) - 1,
            documents=int(documents[power]),
            tokens=int(tokens[power]),
        )
        for power in range(int(powers.min()), len(documents))
    ]


def _made_with(folder: Path) -> dict[str, str]:
    path = folder / RECIPE
    try:
        return read_document(read_regular(path, _RECIPE_BYTES), Recipe)
    except FileNotFoundError:
        return {}
    except (DocumentError, OSError) as error:
        raise DataError(f"{path} must be what tokenize wrote, but cannot be used: {shown(str(error))}") from None


def summary(folder: Path) -> list[str]:
    """What the store's index says, without counting anything."""
    index = TokenStore(folder).index
    return [
        f"{index.documents:,} documents, {index.tokens:,} tokens in {index.shards} shards, "
        f"vocabulary {index.vocab_size:,}",
        f"fingerprint {index.fingerprint}",
    ]


def figures_text(figures: StoreFigures) -> list[str]:
    """The figures as lines."""
    f = figures
    lines = [
        f"{f.documents:,} documents, {f.tokens:,} tokens in {f.shards} shards, vocabulary {f.vocab_size:,} "
        f"({f.ids_used:,} of it used)",
        f"{f.text_bytes:,} bytes of text, {f.bytes_per_token:.3f} bytes per token",
    ]
    if f.labels is not None:
        lines.append(f"{f.labels:,} tokens are labels, {_percent(f.labels, f.tokens)}")
    lines.append(
        f"data.validation_fraction={f.validation_fraction:g} holds out {f.validation_documents:,} documents "
        f"({_percent(f.validation_documents, f.documents)}) with {f.validation_tokens:,} tokens "
        f"({_percent(f.validation_tokens, f.tokens)})"
    )
    if f.made_with:
        lines.append("made with " + ", ".join(f"{shown(name)} {shown(value)}" for name, value in f.made_with.items()))
    lines.append(f"fingerprint {f.fingerprint}")
    if f.lengths:
        spread = ", ".join(f"{_quantile_name(share)} {tokens:,}" for share, tokens in f.length_quantiles.items())
        lines += ["", f"tokens per document: mean {f.length_mean:,.1f}, {spread}", *_bars(f.lengths)]
    return lines


def _quantile_name(share: str) -> str:
    return {"0": "shortest", "0.5": "median", "1": "longest"}.get(share, f"{100 * float(share):g} %")


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / max(1, whole):.2f} %"


def _bars(bins: list[LengthBin]) -> list[str]:
    """A line for each bin, as long as it has documents."""
    most, documents = max(b.documents for b in bins), sum(b.documents for b in bins)
    widths = [len(f"{bins[-1].longest:,}"), len(f"{most:,}")]
    return [
        f"{b.shortest:>{widths[0]},} to {b.longest:>{widths[0]},}  {b.documents:>{widths[1]},} documents "
        f"{_percent(b.documents, documents):>8}  {'█' * -(-_BAR * b.documents // most)}".rstrip()
        for b in bins
    ]
