"""From documents to ids. Runs in tokenising processes, so nothing here imports torch."""

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from regrow.trainer.data.tokenizer import tokenizer_errors

__all__ = ["DocumentMarks", "Encoded", "encode_documents"]

_BATCH = 64
_BATCH_CHARACTERS = 1 << 20


class DocumentMarks(NamedTuple):
    """What stands around each document of text.

    Attributes:
        end: the id after it.
        begin: the id before it; None: none.
    """

    end: int
    begin: int | None = None


class Encoded(NamedTuple):
    """A document.

    Attributes:
        ids: its tokens, integers `(tokens,)`.
        content: the hash of what it says, 64 bits, which decides its split.
        labels: which tokens are labels, bool `(tokens,)`; None: all.
    """

    ids: npt.NDArray[Any]
    content: int
    labels: npt.NDArray[np.bool_] | None = None


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    """Documents as they are encoded together: a number of them, fewer where they are long."""
    batch: list[str] = []
    length = 0
    for text in documents:
        batch.append(text)
        length += len(text)
        if len(batch) == _BATCH or length >= _BATCH_CHARACTERS:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def encode_documents(documents: Iterator[str], tokenizer: Tokenizer, marks: DocumentMarks) -> Iterator[Encoded]:
    """The ids of each document that has some, between its marks, and the hash of its content.

    Raises:
        DataError: the tokenizer fails.
    """
    before = [] if marks.begin is None else [marks.begin]
    for batch in _batches(documents):
        with tokenizer_errors("data.tokenizer must encode the corpus, but fails"):
            # Without keeping track of where in the text each token lies, which nobody asks for.
            encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        for text, encoding in zip(batch, encodings, strict=True):
            # A list of its own at each call.
            if ids := encoding.ids:
                ids.append(marks.end)
                content = hashlib.blake2b(text.encode(), digest_size=8).digest()
                yield Encoded(np.array(before + ids if before else ids), int.from_bytes(content, "little"))
