"""Tokenizers: loading a Hugging Face `tokenizer.json`, or training a byte-level BPE on the corpus."""

import hashlib
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from regrow.checkpoint.documents import DocumentError, convert_document, parse_json
from regrow.checkpoint.files import read_regular
from regrow.trainer.data.errors import DataError, shown

__all__ = [
    "END_OF_TEXT",
    "TokenizerFiles",
    "end_of_text_id",
    "first_token_id",
    "load_tokenizer",
    "parse_tokenizer",
    "read_tokenizer_files",
    "renumbered_tokens",
    "stored_options",
    "tokenizer_errors",
    "tokenizer_file",
    "tokenizer_hash",
    "train_bpe",
    "vocabulary_size",
]

log = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_CONFIG = "tokenizer_config.json"
_COMMON_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")
_TRAIN_BYTES = 64 << 20
# Those of the largest vocabularies (262,144 tokens) have 35 MB.
_FILE_BYTES = 256 << 20
_CONFIG_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class _TokenContent:
    content: Annotated[str, Meta(max_length=4096)]


@dataclass(frozen=True, kw_only=True, slots=True)
class _TokenizerConfig:
    """What is looked at in `tokenizer_config.json`."""

    eos_token: Annotated[str, Meta(max_length=4096)] | _TokenContent | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _ModelOptions:
    dropout: Any = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _AddedToken:
    id: int
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _AddedTokens:
    added_tokens: list[_AddedToken] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class _StoredOptions:
    """What a `tokenizer.json` holds that is no part of the tokenizer."""

    padding: Any = None
    truncation: Any = None
    model: _ModelOptions = _ModelOptions()


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerFiles:
    """A tokenizer as it is given.

    Attributes:
        body: of `tokenizer.json`.
        config: the body of the `tokenizer_config.json` beside it, where there is one.
        ends: names of the token between documents, the first that the tokenizer has counts.
    """

    body: bytes
    config: bytes | None
    ends: tuple[str, ...]


def tokenizer_file(path: str) -> Path:
    """The `tokenizer.json` at `path`, a file or a folder.

    Raises:
        FileNotFoundError: there is none.
        DataError: there is no such user's home folder.
    """
    try:
        file = Path(path).expanduser()
        file = file / "tokenizer.json" if file.is_dir() else file
        exists = file.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"data.tokenizer must be a file or folder, but {path} is not ({error}); check it") from error
    if not exists:
        raise FileNotFoundError(
            f"data.tokenizer must be a tokenizer.json or a folder with one, but {path} is not; check the path"
        )
    return file


def read_tokenizer_files(file: Path, eos_token: str | None) -> TokenizerFiles:
    """Reads a `tokenizer.json` and what names its end of text.

    Args:
        file: the `tokenizer.json`.
        eos_token: `data.eos_token`.

    Raises:
        DataError: one cannot be read.
    """
    config, ends = _read_ends(file, eos_token)
    return TokenizerFiles(body=_read(file, _FILE_BYTES), config=config, ends=ends)


def _read(file: Path, limit: int) -> bytes:
    try:
        return read_regular(file, limit)
    except OSError as error:
        raise DataError(
            f"data.tokenizer must be files that can be read, but {file} cannot ({error.strerror or error}); check it"
        ) from error


def _read_ends(file: Path, eos_token: str | None) -> tuple[bytes | None, tuple[str, ...]]:
    """The body of the `tokenizer_config.json`, and the names that the end of text may have."""
    beside = file.with_name(TOKENIZER_CONFIG)
    body = _read(beside, _CONFIG_BYTES) if beside.exists() else None
    if eos_token is not None:
        return body, (eos_token,)
    if body is None:
        return None, _COMMON_ENDS
    try:
        named = convert_document(parse_json(body.removeprefix(b"\xef\xbb\xbf")), _TokenizerConfig).eos_token
    except DocumentError as error:
        raise DataError(
            f"data.tokenizer must have a sound {TOKENIZER_CONFIG}, but {beside} cannot be used: {shown(str(error))}; "
            "mend it, or remove it and set data.eos_token"
        ) from None
    name = named.content if isinstance(named, _TokenContent) else named
    return body, ((name,) if name is not None else ()) + _COMMON_ENDS


@contextmanager
def tokenizer_errors(what: str) -> Iterator[None]:
    """Turns what the library raises, a panic included, into one sentence that begins with `what`.

    Raises:
        DataError: the library raised.
    """
    try:
        yield
    except DataError:
        raise
    except MemoryError:
        raise
    except BaseException as error:
        # The library raises plain Exception; a panic of its Rust code is no Exception and cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = shown(" ".join(str(error).split()))
        raise DataError(f"{what} ({reason}); use another data.tokenizer") from None


def load_tokenizer(file: Path) -> Tokenizer:
    """Reads a tokenizer as it encodes a corpus: without truncation, padding and dropout, whatever the file asks for.

    Raises:
        DataError: the file is none.
    """
    return parse_tokenizer(_read(file, _FILE_BYTES), file)


def parse_tokenizer(body: bytes, file: Path) -> Tokenizer:
    """The tokenizer in the bytes of `file`; see `load_tokenizer`."""
    with tokenizer_errors(f"data.tokenizer must be a Hugging Face tokenizer.json, but {file} is not"):
        tokenizer = Tokenizer.from_buffer(body)
        # What its last user had switched on is stored with it.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        model: Any = tokenizer.model
        if isinstance(model, models.BPE) and model.dropout is not None:
            model.dropout = None
        return tokenizer


def stored_options(body: bytes) -> list[str]:
    """What the bytes of a `tokenizer.json` ask for that would change a corpus: padding, truncation, dropout."""
    try:
        stored = msgspec.json.decode(body, type=_StoredOptions)
    except (msgspec.MsgspecError, RecursionError):
        return []
    asked = {"padding": stored.padding, "truncation": stored.truncation, "dropout": stored.model.dropout}
    return [name for name, value in asked.items() if value is not None]


def renumbered_tokens(tokenizer: Tokenizer, body: bytes) -> list[str]:
    """Added tokens whose ids in the bytes are not those that the library gives them, in words."""
    try:
        added = msgspec.json.decode(body, type=_AddedTokens).added_tokens
    except (msgspec.MsgspecError, RecursionError):
        return []
    found = ((t.content, t.id, _token_id(tokenizer, t.content)) for t in added)
    return [f"{shown(name)} (id {stated}) is {given}" for name, stated, given in found if stated != given]


def tokenizer_hash(body: bytes) -> str:
    """Identifies a tokenizer by its file's bytes."""
    return hashlib.blake2b(body, digest_size=8).hexdigest()


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id; the number of tokens is smaller where ids are left out."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def end_of_text_id(tokenizer: Tokenizer, file: Path, eos_token: str | None) -> int:
    """The id of the token between documents.

    Args:
        tokenizer: the tokenizer.
        file: where it was read from; a `tokenizer_config.json` beside it may name the token.
        eos_token: `data.eos_token`.

    Raises:
        DataError: none can be found.
    """
    return first_token_id(tokenizer, file, _read_ends(file, eos_token)[1])


def first_token_id(tokenizer: Tokenizer, file: Path, names: tuple[str, ...], option: str = "data.eos_token") -> int:
    """The id of the first of the names that is a token.

    Args:
        tokenizer: the tokenizer.
        file: where it was read from.
        names: to look for.
        option: that names them.

    Raises:
        DataError: none is.
    """
    for candidate in names:
        found = _token_id(tokenizer, candidate)
        if found is None:
            continue
        if candidate != names[0] and len(names) > len(_COMMON_ENDS):
            words = "%s names %r, which is no token of %s; documents end with %r"
            log.warning(words, TOKENIZER_CONFIG, names[0], file, candidate)
        return found
    raise DataError(
        f"{option} must name a token of {file}, but none of {', '.join(map(shown, names))} is one; set {option}"
    )


def _token_id(tokenizer: Tokenizer, name: str) -> int | None:
    try:
        found = tokenizer.token_to_id(name)
    except (TypeError, UnicodeEncodeError):  # half a surrogate pair
        return None
    return None if found is None else int(found)


def _head(documents: Iterable[str], limit: int) -> Iterator[str]:
    """Documents until `limit` characters have passed."""
    seen = 0
    for text in documents:
        yield text
        seen += len(text)
        if seen >= limit:
            return


def train_bpe(documents: Iterable[str], vocab_size: int, file: Path) -> None:
    """Trains a byte-level BPE (Radford et al. 2019) on the corpus' first 64 MB and writes it to `file`.

    The same documents give the same tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_head(documents, _TRAIN_BYTES), trainer)
    temporary = file.with_suffix(".tmp")
    tokenizer.save(str(temporary))
    temporary.rename(file)
