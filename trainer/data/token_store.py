"""Tokenised corpora on disk: memory-mapped shards and an index, made once and read by every rank.

index.json                what is there, written last
corpus.json               everything that decided the bytes, written first
tokenizer.json            the tokenizer that made the ids
shard-00000.tokens        ids, uint16 or uint32, documents one after another, each ended by end-of-text
shard-00000.documents.npy length and content hash of each document
shard-00000.labels        a byte for each token, 0 where it is no label; where documents say so, as chats do
"""

import hashlib
import json
import logging
import os
from array import array
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, final

import numpy as np
import numpy.typing as npt
from msgspec import Meta

from regrow.checkpoint.documents import Count, DocumentError, convert_document, parse_json
from regrow.checkpoint.files import open_regular, read_regular
from regrow.trainer.data.config import TokensConfig
from regrow.trainer.data.encoding import Encoded
from regrow.trainer.data.label_mask import ArrayMask
from regrow.trainer.data.source import DataError, Source, shown
from regrow.trainer.data.tokenizer import parse_tokenizer, stored_options, tokenizer_hash, vocabulary_size

__all__ = [
    "Index",
    "ShardFiles",
    "StoreDamagedError",
    "TokenStore",
    "TokensSource",
    "shard_files",
    "shard_is_complete",
    "write_index",
    "write_shard",
]

log = logging.getLogger(__name__)

# Format 1 named the number of tokens as the vocabulary's size, which is too small where ids are left out.
FORMAT = 2
# Of a store whose documents say which tokens are labels: a version that would take all of them refuses it.
FORMAT_WITH_LABELS = 3
_READ_FORMATS = (1, FORMAT, FORMAT_WITH_LABELS)
INDEX = "index.json"
TOKENIZER = "tokenizer.json"
DOCUMENT = np.dtype([("tokens", "<u4"), ("hash", "<u8")])
_INDEX_BYTES = 1 << 20
_TOKENIZER_BYTES = 256 << 20
_REMEDY = "remove the folder and tokenize again"


class StoreDamagedError(DataError):
    """A token store is not what was written: damaged, cut short, or never finished."""


class ShardFiles(NamedTuple):
    """The files of one shard; `labels` is there where its documents say which tokens are labels."""

    tokens: Path
    documents: Path
    labels: Path


def shard_files(folder: Path, shard: int) -> ShardFiles:
    """Where the files of a shard lie."""
    return ShardFiles(*_names(folder, shard), _labels_file(folder, shard))


def _names(folder: Path, shard: int) -> tuple[Path, Path]:
    return folder / f"shard-{shard:05d}.tokens", folder / f"shard-{shard:05d}.documents.npy"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest type that holds every id below `vocab_size`."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def _labels_file(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.labels"


def shard_is_complete(folder: Path, shard: int, dtype: np.dtype[Any], *, labels: bool = False) -> bool:
    """Whether a shard was written to its end, in this type; its document list is renamed into place last."""
    tokens_path, documents_path = _names(folder, shard)
    try:
        rows = _read_documents(documents_path)
        tokens = int(rows["tokens"].sum(dtype=np.int64))
        whole = tokens_path.stat().st_size == tokens * dtype.itemsize
        return whole and (not labels or _labels_file(folder, shard).stat().st_size == tokens)
    except (OSError, StoreDamagedError):
        return False


def _read_documents(path: Path) -> npt.NDArray[Any]:
    """A shard's document list, mapped; its header is believed only where the file's size agrees.

    Raises:
        OSError: it cannot be read.
        StoreDamagedError: it is no such list.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            if version != (1, 0):
                raise ValueError(f"version {version}")
            shape, _, dtype = np.lib.format.read_array_header_1_0(file, max_header_size=4096)
        except Exception as error:  # numpy evaluates the header as Python literals; much can be wrong with it
            raise StoreDamagedError(f"{path} is no list of documents ({type(error).__name__})") from None
        size = os.fstat(file.fileno()).st_size - file.tell()
        if dtype != DOCUMENT or len(shape) != 1 or type(shape[0]) is not int or shape[0] * DOCUMENT.itemsize != size:
            raise StoreDamagedError(f"{path} is no list of documents, or was cut short")
        if not shape[0]:
            return np.empty(0, DOCUMENT)  # an empty file cannot be mapped
        rows: npt.NDArray[Any] = np.memmap(file, dtype=DOCUMENT, mode="r", offset=file.tell(), shape=(shape[0],))
    return rows


def write_shard(folder: Path, shard: int, documents: Iterable[Encoded], dtype: np.dtype[Any]) -> int:
    """Writes one shard; returns the number of its tokens."""
    tokens_path, documents_path = _names(folder, shard)
    labels_path = _labels_file(folder, shard)
    # Of short documents there are millions in a shard: as tuples they would take more memory than all else.
    lengths, hashes = array("I"), array("Q")
    # A reader may have mapped the shard that this one replaces.
    temporary, labels_temporary = tokens_path.with_suffix(".tokens.tmp"), labels_path.with_suffix(".labels.tmp")
    with temporary.open("wb") as out, ExitStack() as held:
        labels_out = None
        for document in documents:
            out.write(document.ids.astype(dtype).tobytes())
            lengths.append(len(document.ids))
            hashes.append(document.content)
            if document.labels is not None:
                labels_out = labels_out or held.enter_context(labels_temporary.open("wb"))
                labels_out.write(document.labels.astype(np.uint8).tobytes())
    temporary.rename(tokens_path)
    if labels_out is not None:
        labels_temporary.rename(labels_path)
    rows = np.empty(len(lengths), DOCUMENT)
    rows["tokens"], rows["hash"] = lengths, hashes
    temporary = documents_path.with_suffix(".tmp")
    with temporary.open("wb") as out:
        np.save(out, rows)
    temporary.rename(documents_path)
    return int(rows["tokens"].sum(dtype=np.int64))


_Hash = Annotated[str, Meta(pattern=r"^[0-9a-f]{1,64}\Z")]


@dataclass(frozen=True, kw_only=True, slots=True)
class Index:
    """`index.json`.

    Attributes:
        dtype: of the ids.
        shards: number of shards.
        tokens: in all.
        documents: in all.
        vocab_size: one more than the tokenizer's largest id.
        tokenizer_hash: of its file.
        fingerprint: of every document's length and content hash, and the tokenizer.
        end_of_text: the id that ends each document; None where format 1 did not say.
        labels: documents say which of their tokens are labels.
    """

    dtype: Literal["<u2", "<u4"]
    shards: Annotated[int, Meta(ge=0, le=10**6)]
    tokens: Count
    documents: Count
    vocab_size: Annotated[int, Meta(ge=0, le=2**32)]
    tokenizer_hash: _Hash
    fingerprint: _Hash
    end_of_text: Annotated[int, Meta(ge=0, lt=2**32)] | None = None
    labels: bool = False

    def __post_init__(self) -> None:
        if self.vocab_size > 1 << (8 * np.dtype(self.dtype).itemsize):
            raise ValueError(f"ids below `vocab_size` ({self.vocab_size}) do not fit into `dtype` ({self.dtype})")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Format:
    """What every version of `index.json` holds."""

    format: int


def read_index(folder: Path) -> Index:
    """The index of a store; that of format 1 with the vocabulary's size as it is counted today.

    Raises:
        FileNotFoundError: there is no store in `folder`.
        StoreDamagedError: it is not what this version or an earlier one writes.
        DataError: it cannot be read, or is of a later version.
    """
    path = folder / INDEX
    try:
        value = parse_json(_read_bytes(path, _INDEX_BYTES))
        found = convert_document(value, _Format).format
        if found not in _READ_FORMATS:
            raise DataError(
                f"{folder} has format {found}, but this version reads {', '.join(map(str, _READ_FORMATS))}; "
                "tokenize it again into another folder"
            )
        index = convert_document(value, Index)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"data.path must be a folder made by `regrow-data tokenize`, but {folder} has no {INDEX}; check the path"
        ) from error
    except DocumentError as error:
        raise StoreDamagedError(f"{path} cannot be used: {shown(str(error))}; {_REMEDY}") from None
    return _recount(index, folder) if found < FORMAT else index


def _read_bytes(path: Path, limit: int) -> bytes:
    try:
        return read_regular(path, limit)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DataError(
            f"data.path must hold files that can be read, but {path} cannot ({error.strerror or error}); check it"
        ) from error


def _recount(index: Index, folder: Path) -> Index:
    """An index of format 1, whose size of the vocabulary was the number of tokens."""
    body = _read_bytes(folder / TOKENIZER, _TOKENIZER_BYTES)
    size = vocabulary_size(parse_tokenizer(body, folder / TOKENIZER))
    if options := stored_options(body):
        words = "%s was written by a version that applied the tokenizer's %s to the text; tokenize it again"
        log.warning(words, folder, " and ".join(options))
    try:
        return convert_document({**asdict(index), "vocab_size": max(size, index.vocab_size)}, Index)
    except DocumentError as error:
        raise StoreDamagedError(f"{folder} was written by a version that cut ids short: {error}; {_REMEDY}") from None


def write_index(
    folder: Path, shards: int, vocab_size: int, tokenizer_hash: str, end_of_text: int, *, labels: bool = False
) -> Index:
    """Completes a store whose shards and tokenizer are there."""
    rows = [_read_documents(_names(folder, shard)[1]) for shard in range(shards)]
    index = Index(
        dtype="<u2" if token_dtype(vocab_size).itemsize == 2 else "<u4",
        shards=shards,
        tokens=sum(int(r["tokens"].sum(dtype=np.int64)) for r in rows),
        documents=sum(len(r) for r in rows),
        vocab_size=vocab_size,
        tokenizer_hash=tokenizer_hash,
        fingerprint=_fingerprint(tokenizer_hash, rows),
        end_of_text=end_of_text,
        labels=labels,
    )
    values = {"format": FORMAT_WITH_LABELS if labels else FORMAT, **asdict(index)}
    if not labels:
        del values["labels"]
    temporary = folder / f"{INDEX}.tmp"
    temporary.write_text(json.dumps(values, indent=1))
    temporary.rename(folder / INDEX)
    return index


def _fingerprint(tokenizer_hash: str, rows: Iterable[npt.NDArray[Any]]) -> str:
    hashed = hashlib.blake2b(tokenizer_hash.encode(), digest_size=16)
    for part in rows:
        hashed.update(part.tobytes())
    return hashed.hexdigest()


@final
class TokenStore:
    """Reads a store; cheap to open, the ids stay on disk until they are asked for.

    Attributes:
        index: what is there.
        lengths: tokens of each document, int64.
        hashes: content hash of each document, uint64.
        labels: which tokens are labels; None: all.

    Raises:
        FileNotFoundError: there is no store in `folder`.
        StoreDamagedError: index, documents, tokenizer and shards do not fit each other.
        DataError: it cannot be read, or is of a later version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = read_index(folder)
        rows = [self._documents(s) for s in range(self.index.shards)]
        self.lengths = np.concatenate([r["tokens"] for r in rows] or [np.empty(0)]).astype(np.int64)
        self.hashes = np.concatenate([r["hash"] for r in rows] or [np.empty(0)]).astype(np.uint64)
        self._check_documents(rows)
        self._shard_starts = np.cumsum([0, *(int(r["tokens"].sum(dtype=np.int64)) for r in rows)])
        self._shards = [self._open(s) for s in range(self.index.shards)]
        self.labels = ArrayMask(*map(self._open_labels, range(self.index.shards))) if self.index.labels else None
        self._check_tokenizer()

    def _documents(self, shard: int) -> npt.NDArray[Any]:
        path = _names(self.folder, shard)[1]
        try:
            return _read_documents(path)
        except FileNotFoundError:
            raise StoreDamagedError(f"{path} is missing, which {INDEX} counts; {_REMEDY}") from None
        except StoreDamagedError as error:
            raise StoreDamagedError(f"{error}; {_REMEDY}") from None
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror or error}); check it") from error

    def _check_documents(self, rows: list[npt.NDArray[Any]]) -> None:
        index = self.index
        found = (len(self.lengths), int(self.lengths.sum()), _fingerprint(index.tokenizer_hash, rows))
        if found != (index.documents, index.tokens, index.fingerprint) or (self.lengths < 1).any():
            raise StoreDamagedError(
                f"{self.folder} must hold the documents that its {INDEX} counts ({index.documents} with "
                f"{index.tokens} tokens, fingerprint {index.fingerprint}), but holds {found[0]} with {found[1]}, "
                f"{found[2]}; {_REMEDY}"
            )

    def _check_tokenizer(self) -> None:
        try:
            found = tokenizer_hash(_read_bytes(self.tokenizer_file, _TOKENIZER_BYTES))
        except FileNotFoundError:
            found = "missing"
        if found != self.index.tokenizer_hash:
            raise StoreDamagedError(
                f"{self.tokenizer_file} must be the tokenizer that made the ids (hash {self.index.tokenizer_hash}), "
                f"but is {found}; put it back, or {_REMEDY}"
            )

    def _open(self, shard: int) -> npt.NDArray[Any]:
        return self._map(_names(self.folder, shard)[0], shard, np.dtype(self.index.dtype))

    def _open_labels(self, shard: int) -> npt.NDArray[np.uint8]:
        path = _labels_file(self.folder, shard)
        tokens = int(self._shard_starts[shard + 1] - self._shard_starts[shard])
        # A part of the corpus without documents has no labels either.
        return self._map(path, shard, np.dtype(np.uint8)) if tokens else np.empty(0, np.uint8)

    def _map(self, path: Path, shard: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        count = int(self._shard_starts[shard + 1] - self._shard_starts[shard])
        try:
            with os.fdopen(open_regular(path), "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != count * dtype.itemsize:
                    raise StoreDamagedError(
                        f"{path} must have {count * dtype.itemsize} bytes, but has {size}; {_REMEDY}"
                    )
                # An empty file cannot be mapped.
                return np.memmap(file, dtype=dtype, mode="r", shape=(count,)) if count else np.empty(0, dtype)
        except FileNotFoundError:
            raise StoreDamagedError(f"{path} is missing, which {INDEX} counts; {_REMEDY}") from None
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror or error}); check it") from error

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer that made the ids."""
        return self.folder / TOKENIZER

    def read(self, start: int, out: npt.NDArray[np.int64]) -> None:
        """Copies the tokens from global offset `start` on into `out`; they must lie in one shard.

        Raises:
            StoreDamagedError: an id is beyond the vocabulary.
        """
        shard = int(np.searchsorted(self._shard_starts, start, side="right")) - 1
        offset = start - int(self._shard_starts[shard])
        out[:] = self._shards[shard][offset : offset + len(out)]
        if len(out) and int(out.max()) >= self.index.vocab_size:
            raise StoreDamagedError(
                f"{_names(self.folder, shard)[0]} must hold ids below {self.index.vocab_size}, but holds "
                f"{int(out.max())} among tokens {offset} to {offset + len(out)}; {_REMEDY}"
            )

    def shard_of(self, offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The shard in which each global offset lies."""
        return np.searchsorted(self._shard_starts, offsets, side="right") - 1


@final
class TokensSource(Source):
    """`data=tokens`."""

    config: TokensConfig

    def check(self) -> None:
        TokenStore(self._folder())

    def prepared(self) -> Path:
        return self._folder()

    def _folder(self) -> Path:
        try:
            return Path(self.config.path).expanduser()
        except RuntimeError as error:
            raise DataError(f"data.path must be a folder, but is {self.config.path} ({error}); check it") from None
