"""Tokenised corpora on disk: memory-mapped shards and an index, made once and read by every rank.

index.json                what is there, written last
tokenizer.json            the tokenizer that made the ids
shard-00000.tokens        ids, uint16 or uint32, documents one after another, each ended by end-of-text
shard-00000.documents.npy length and content hash of each document
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import numpy.typing as npt

from trainer.data.config import TokensConfig
from trainer.data.source import Source

__all__ = ["TokenStore", "TokensSource", "shard_is_complete", "write_index", "write_shard"]

FORMAT = 1
INDEX = "index.json"
TOKENIZER = "tokenizer.json"
DOCUMENT = np.dtype([("tokens", "<u4"), ("hash", "<u8")])


def _names(folder: Path, shard: int) -> tuple[Path, Path]:
    return folder / f"shard-{shard:05d}.tokens", folder / f"shard-{shard:05d}.documents.npy"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest type that holds every id."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def shard_is_complete(folder: Path, shard: int) -> bool:
    """Whether a shard was written to its end; its document list is renamed into place last."""
    return _names(folder, shard)[1].exists()


def write_shard(
    folder: Path, shard: int, documents: Iterable[tuple[npt.NDArray[Any], int]], dtype: np.dtype[Any]
) -> int:
    """Writes one shard from (ids, content hash) pairs; returns the number of its tokens."""
    tokens_path, documents_path = _names(folder, shard)
    rows: list[tuple[int, int]] = []
    with tokens_path.open("wb") as out:
        for ids, content_hash in documents:
            out.write(ids.astype(dtype).tobytes())
            rows.append((len(ids), content_hash))
    temporary = documents_path.with_suffix(".tmp")
    with temporary.open("wb") as out:
        np.save(out, np.array(rows, dtype=DOCUMENT))
    temporary.rename(documents_path)
    return sum(n for n, _ in rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class Index:
    """`index.json`.

    Attributes:
        dtype: of the ids.
        shards: number of shards.
        tokens: in all.
        documents: in all.
        vocab_size: of the tokenizer.
        tokenizer_hash: of its file.
        fingerprint: of every document's length and content hash, and the tokenizer.
    """

    dtype: str
    shards: int
    tokens: int
    documents: int
    vocab_size: int
    tokenizer_hash: str
    fingerprint: str


def write_index(folder: Path, shards: int, vocab_size: int, tokenizer_hash: str) -> Index:
    """Completes a store whose shards and tokenizer are there."""
    fingerprint = hashlib.blake2b(tokenizer_hash.encode(), digest_size=16)
    tokens = documents = 0
    for shard in range(shards):
        rows = np.load(_names(folder, shard)[1])
        fingerprint.update(rows.tobytes())
        tokens += int(rows["tokens"].sum(dtype=np.int64))
        documents += len(rows)
    index = Index(
        dtype=token_dtype(vocab_size).str,
        shards=shards,
        tokens=tokens,
        documents=documents,
        vocab_size=vocab_size,
        tokenizer_hash=tokenizer_hash,
        fingerprint=fingerprint.hexdigest(),
    )
    temporary = folder / f"{INDEX}.tmp"
    temporary.write_text(json.dumps({"format": FORMAT, **asdict(index)}, indent=1))
    temporary.rename(folder / INDEX)
    return index


@final
class TokenStore:
    """Reads a store; cheap to open, the ids stay on disk until they are asked for.

    Attributes:
        index: what is there.
        lengths: tokens of each document, int64.
        hashes: content hash of each document, uint64.

    Raises:
        FileNotFoundError: there is no store in `folder`.
        ValueError: it was made by another version, or a shard does not fit the index.
    """

    def __init__(self, folder: Path) -> None:
        try:
            document = json.loads((folder / INDEX).read_text())
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"data.path must be a folder made by `regrow-data tokenize`, but {folder} has no {INDEX}; "
                "check the path"
            ) from error
        found = document.pop("format")
        if found != FORMAT:
            raise ValueError(f"{folder} has format {found}, but this version reads {FORMAT}; tokenize it again")
        self.folder = folder
        self.index = Index(**document)
        rows = [np.load(_names(folder, s)[1], mmap_mode="r") for s in range(self.index.shards)]
        self.lengths = np.concatenate([r["tokens"] for r in rows] or [np.empty(0)]).astype(np.int64)
        self.hashes = np.concatenate([r["hash"] for r in rows] or [np.empty(0)]).astype(np.uint64)
        self._shard_starts = np.cumsum([0, *(int(r["tokens"].sum(dtype=np.int64)) for r in rows)])
        self._shards = [self._open(s) for s in range(self.index.shards)]

    def _open(self, shard: int) -> npt.NDArray[Any]:
        path, dtype = _names(self.folder, shard)[0], np.dtype(self.index.dtype)
        count = int(self._shard_starts[shard + 1] - self._shard_starts[shard])
        if path.stat().st_size != count * dtype.itemsize:
            raise ValueError(
                f"{path} must have {count * dtype.itemsize} bytes, but has {path.stat().st_size}; tokenize it again"
            )
        # An empty file cannot be mapped.
        return np.memmap(path, dtype=dtype, mode="r") if count else np.empty(0, dtype)

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer that made the ids."""
        return self.folder / TOKENIZER

    def read(self, start: int, out: npt.NDArray[np.int64]) -> None:
        """Copies the tokens from global offset `start` on into `out`; they must lie in one shard."""
        shard = int(np.searchsorted(self._shard_starts, start, side="right")) - 1
        offset = start - int(self._shard_starts[shard])
        out[:] = self._shards[shard][offset : offset + len(out)]

    def shard_of(self, offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The shard in which each global offset lies."""
        return np.searchsorted(self._shard_starts, offsets, side="right") - 1


@final
class TokensSource(Source):
    """`data=tokens`."""

    config: TokensConfig

    def check(self) -> None:
        TokenStore(Path(self.config.path).expanduser())

    def prepared(self) -> Path:
        return Path(self.config.path).expanduser()
