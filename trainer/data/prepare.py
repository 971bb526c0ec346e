"""From a source of text to a token store: in parallel, resumable, once per file and tokenizer.

The store of a corpus of files is made of its files' shards, which the cache keeps (see `file_shards`), unless the
tokenizer is trained on the corpus: every file then has a part in every id. Nothing in the cache is ever removed.

Runs before any rank starts, so nothing here imports torch.
"""

import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer

from regrow.trainer.data.cache import cache_folder, writing_to
from regrow.trainer.data.config import DataConfig
from regrow.trainer.data.encoding import DocumentMarks
from regrow.trainer.data.file_shards import shard_places
from regrow.trainer.data.recipe import check_recipe, recipe_key, recipe_of
from regrow.trainer.data.source import CorpusPart, CorpusSource, DataError, Source
from regrow.trainer.data.token_store import (
    INDEX,
    TOKENIZER,
    Index,
    StoreDamagedError,
    TokenStore,
    write_index,
)
from regrow.trainer.data.tokenizer import (
    TOKENIZER_CONFIG,
    TokenizerFiles,
    first_token_id,
    load_tokenizer,
    parse_tokenizer,
    read_tokenizer_files,
    renumbered_tokens,
    stored_options,
    tokenizer_file,
    tokenizer_hash,
    train_bpe,
    vocabulary_size,
)
from regrow.trainer.data.tokenizing import Encoding, write_shards

__all__ = ["cache_folder", "complete_store", "only_one", "prepare", "store_folder", "tokenize"]

log = logging.getLogger(__name__)
_LARGEST_BPE = 1 << 24


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Makes a second process that prepares the same corpus wait for the first."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def prepare(source: Source, check_vocabulary: Callable[[int], None] = lambda _size: None) -> Path:
    """The folder of the source's token store, made now if it does not exist or was damaged.

    Args:
        source: of the text.
        check_vocabulary: raises where the model cannot take so many ids; asked before anything is tokenised.

    Raises:
        DataError: the corpus is empty or cannot be read, or the cache cannot be written.
        FileNotFoundError: a file is missing.
    """
    ready = source.prepared()
    if ready is not None:
        return ready
    assert isinstance(source, CorpusSource)
    folder = store_folder(source)
    if not _is_complete(folder):
        with writing_to(folder, "data.cache"), only_one(folder):
            complete_store(source, folder, check_vocabulary)
    return folder


def store_folder(source: CorpusSource) -> Path:
    """Where the cache holds the source's token store, made or not.

    Raises:
        DataError: the corpus or the tokenizer cannot be read.
        FileNotFoundError: a file is missing.
    """
    recipe = recipe_of(source, _given_tokenizer(source.config))
    return cache_folder(source.config) / "tokens" / recipe_key(recipe)


def complete_store(
    source: CorpusSource, folder: Path, check_vocabulary: Callable[[int], None] = lambda _size: None
) -> None:
    """Makes the source's token store, or what is missing of it; a damaged one is made again.

    Raises:
        DataError: what lies there was made with other options, or the corpus cannot be read.
    """
    check_recipe(folder, recipe_of(source, _given_tokenizer(source.config)))
    if not _is_complete(folder):
        if os.path.lexists(folder / INDEX):
            _discard(folder)
        tokenize(source, folder, check_vocabulary)


def _is_complete(folder: Path) -> bool:
    """Whether a sound store lies in `folder`."""
    if not os.path.lexists(folder / INDEX):
        return False
    try:
        TokenStore(folder)
    except StoreDamagedError as error:
        log.warning("tokenising again, because %s", str(error).rpartition("; ")[0])
        return False
    return True


def _discard(folder: Path) -> None:
    """Removes index, tokenizer and shards, which do not fit each other."""
    for path in (folder / INDEX, folder / TOKENIZER, *folder.glob("shard-*")):
        path.unlink(missing_ok=True)


def _given_tokenizer(config: DataConfig) -> TokenizerFiles | None:
    """The tokenizer that the config names; None: one is trained."""
    if config.tokenizer is not None:
        return read_tokenizer_files(tokenizer_file(config.tokenizer), config.eos_token)
    if not 1 <= config.tokenizer_vocab_size <= _LARGEST_BPE:
        raise DataError(
            f"data.tokenizer_vocab_size must be at least 1 and at most {_LARGEST_BPE}, but is "
            f"{config.tokenizer_vocab_size}; use 4096"
        )
    return None


def _place_tokenizer(
    source: CorpusSource, given: TokenizerFiles | None, units: list[CorpusPart], folder: Path
) -> Encoding:
    """Copies or trains the tokenizer into the store."""
    placed = folder / TOKENIZER
    if given is not None:
        if given.config is not None:
            _write(folder / TOKENIZER_CONFIG, given.config)
        assert source.config.tokenizer is not None
        file = tokenizer_file(source.config.tokenizer)
        tokenizer, body, ends = parse_tokenizer(given.body, file), given.body, given.ends
        if options := stored_options(body):
            log.warning("the corpus is tokenised without the %s that %s asks for", " and ".join(options), file)
        if renumbered := renumbered_tokens(tokenizer, body):
            words = "%d added tokens of %s get other ids, because its model's vocabulary lacks them: %s"
            log.warning(words, len(renumbered), file, ", ".join(renumbered[:5]))
        _write(placed, body)
    else:
        if not _is_tokenizer(placed):
            _discard(folder)
            log.info("training a byte-level BPE with %d tokens", source.config.tokenizer_vocab_size)
            train_bpe((d for u in units for d in source.read(u)), source.config.tokenizer_vocab_size, placed)
            source.notes.counts.clear()  # they are counted again when the documents are tokenised
        trained = read_tokenizer_files(placed, source.config.eos_token)
        file, tokenizer, body, ends = placed, parse_tokenizer(trained.body, placed), trained.body, trained.ends
    return Encoding(
        tokenizer_hash=tokenizer_hash(body),
        marks=DocumentMarks(first_token_id(tokenizer, file, ends), _begin_id(tokenizer, file, source.config)),
        vocab_size=vocabulary_size(tokenizer),
    )


def _begin_id(tokenizer: Tokenizer, file: Path, config: DataConfig) -> int | None:
    name = config.bos_token
    return None if name is None else first_token_id(tokenizer, file, (name,), "data.bos_token")


def _is_tokenizer(file: Path) -> bool:
    try:
        load_tokenizer(file)
    except DataError:
        return False
    return True


def _write(path: Path, body: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(body)
    temporary.rename(path)


def tokenize(
    source: CorpusSource, folder: Path, check_vocabulary: Callable[[int], None] = lambda _size: None
) -> None:
    """Writes the source's token store into `folder`; what was tokenised already is kept.

    Raises:
        DataError: the corpus is empty or cannot be read, or `folder` holds another one.
    """
    given = _given_tokenizer(source.config)
    recipe = recipe_of(source, given)
    units = source.units()
    empty = f"data: the corpus ({source.config._target_}) must not be empty, but has no text; check it"
    if not units:
        raise DataError(empty)
    folder.mkdir(parents=True, exist_ok=True)
    check_recipe(folder, recipe)
    encoding = _place_tokenizer(source, given, units, folder)
    check_vocabulary(encoding.vocab_size)
    # Only with a tokenizer that was not trained on this very corpus may other corpora share what is made.
    places = shard_places(source, units, folder, encoding.identity() if given is not None else None)
    if all(place.content is not None for place in places):
        # Here, and not after hours; of files whose content has no name, asking means reading them.
        _check_unchanged(source, recipe, folder)
    write_shards(source, places, encoding, folder)
    _check_unchanged(source, recipe, folder)
    index = write_index(
        folder,
        len(units),
        encoding.vocab_size,
        encoding.tokenizer_hash,
        encoding.marks.end,
        labels=source.HAS_LABELS,
    )
    if index.documents == 0:
        (folder / INDEX).unlink()
        raise DataError(empty)
    _report(source, index)


def _check_unchanged(source: CorpusSource, recipe: dict[str, str], folder: Path) -> None:
    """Whether the corpus is still the one that the store is named by; if not, the store's shards are removed.

    Raises:
        DataError: it is not.
    """
    if source.key().items() - recipe.items():
        _discard(folder)
        raise DataError("data.files must not change while they are tokenised, but did; give the command again")


def _report(source: CorpusSource, index: Index) -> None:
    log.info("tokenised %d documents, %d tokens", index.documents, index.tokens)
    for what, (count, where) in source.notes.counts.items():
        log.warning("%d x %s; the first is %s", count, what, where)
