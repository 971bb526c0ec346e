"""Small token stores, written in this process."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from regrow.trainer.data.encoding import DocumentMarks, Encoded, encode_documents
from regrow.trainer.data.token_store import token_dtype, write_index, write_shard
from regrow.trainer.data.tokenizer import END_OF_TEXT, load_tokenizer, tokenizer_hash, train_bpe, vocabulary_size

__all__ = ["Labels", "tokenizer_of", "write_store"]

# Which of a document's tokens are labels.
Labels = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.bool_]]


def tokenizer_of(texts: Sequence[str], file: Path) -> Tokenizer:
    """A byte-level BPE, written to `file`."""
    train_bpe(texts, 300, file)
    return load_tokenizer(file)


def write_store(
    folder: Path, shards: Sequence[Sequence[str]], tokenizer_file: Path, labels: Labels | None = None
) -> Path:
    """A store of these documents, shard by shard; returns `folder`."""
    folder.mkdir()
    body = tokenizer_file.read_bytes()
    (folder / "tokenizer.json").write_bytes(body)
    tokenizer = load_tokenizer(tokenizer_file)
    end, size = tokenizer.encode(END_OF_TEXT).ids[0], vocabulary_size(tokenizer)
    for number, texts in enumerate(shards):
        documents = list(encode_documents(iter(texts), tokenizer, DocumentMarks(end)))
        if labels is not None:
            documents = [Encoded(d.ids, d.content, labels(d.ids)) for d in documents]
        write_shard(folder, number, documents, token_dtype(size))
    write_index(folder, len(shards), size, tokenizer_hash(body), end, labels=labels is not None)
    return folder
