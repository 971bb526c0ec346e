"""From a source of text to a token store: in parallel, resumable, once per corpus and tokenizer.

Runs before any rank starts, so nothing here imports torch.
"""

import fcntl
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from regrow.checkpoint.scratch import tag_semaphores
from regrow.trainer.data.cache import cache_folder, writing_to
from regrow.trainer.data.config import DataConfig
from regrow.trainer.data.recipe import check_recipe, recipe_key, recipe_of
from regrow.trainer.data.source import CorpusPart, CorpusSource, DataError, Source
from regrow.trainer.data.token_store import (
    INDEX,
    TOKENIZER,
    Index,
    StoreDamagedError,
    TokenStore,
    shard_is_complete,
    token_dtype,
    write_index,
    write_shard,
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
from regrow.trainer.process import die_with_parent

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoding:
    """How text becomes ids.

    Attributes:
        tokenizer_hash: of the file in the store.
        end_of_text: the id after each document.
        vocab_size: one more than the largest id.
    """

    tokenizer_hash: str
    end_of_text: int
    vocab_size: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """Holds every id."""
        return token_dtype(self.vocab_size)


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
        end_of_text=first_token_id(tokenizer, file, ends),
        vocab_size=vocabulary_size(tokenizer),
    )


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
    """Writes the source's token store into `folder`; shards that are there already are kept.

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
    _write_shards(source, units, encoding, folder)
    if source.key().items() - recipe.items():
        _discard(folder)
        raise DataError("data.files must not change while they are tokenised, but did; give the command again")
    index = write_index(
        folder,
        len(units),
        encoding.vocab_size,
        encoding.tokenizer_hash,
        encoding.end_of_text,
        labels=source.HAS_LABELS,
    )
    if index.documents == 0:
        (folder / INDEX).unlink()
        raise DataError(empty)
    _report(source, index)


def _report(source: CorpusSource, index: Index) -> None:
    log.info("tokenised %d documents, %d tokens", index.documents, index.tokens)
    for what, (count, where) in source.notes.counts.items():
        log.warning("%d x %s; the first is %s", count, what, where)


def _write_shards(source: CorpusSource, units: list[CorpusPart], encoding: Encoding, folder: Path) -> None:
    """Tokenises the parts that are not there yet, several at a time."""
    todo = [
        i for i in range(len(units)) if not shard_is_complete(folder, i, encoding.dtype, labels=source.HAS_LABELS)
    ]
    workers = min(source.config.workers or os.cpu_count() or 1, max(1, len(todo)))
    log.info("tokenising %d parts of the corpus with %d processes", len(todo), workers)
    with _progress(len(units)) as bar:
        bar.advance(bar.task_ids[0], len(units) - len(todo))
        tag_semaphores()
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker, initargs=(os.getpid(),))
        try:
            jobs = [
                pool.submit(tokenize_unit, type(source), source.config, units[i], i, folder, encoding) for i in todo
            ]
            for job in as_completed(jobs):
                source.notes.merge(job.result())
                bar.advance(bar.task_ids[0])
        except BrokenProcessPool as error:
            raise DataError(
                "data.workers must be so few that their memory suffices, but a process that tokenised was killed or "
                f"crashed (there were {workers}); use fewer, or shorter documents"
            ) from error
        finally:
            # On an error or a signal nobody waits for the parts that are left.
            pool.shutdown(wait=False, cancel_futures=True)


def _begin_worker(parent_pid: int) -> None:
    """Slurm signals every process of a step; what a warning means is for the parent to decide."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    die_with_parent(parent_pid)


def _progress(total: int) -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("tokenising"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
    progress.add_task("tokenising", total=total)
    return progress


def tokenize_unit(
    kind: type[CorpusSource], config: DataConfig, unit: CorpusPart, shard: int, folder: Path, encoding: Encoding
) -> dict[str, tuple[int, str]]:
    """Writes one shard; runs in a process of its own. Returns what was noted of the documents."""
    # One process per core already: the library's own threads would only be in each other's way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = load_tokenizer(folder / TOKENIZER)
    source = kind(config)
    write_shard(folder, shard, source.encode(unit, tokenizer, encoding.end_of_text), encoding.dtype)
    return source.notes.counts
