"""Tokenising the parts of a corpus, several at a time, each in a process. Nothing here imports torch."""

import functools
import itertools
import logging
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, final

import numpy as np
from tokenizers import Tokenizer

from regrow.checkpoint.scratch import tag_semaphores
from regrow.trainer.data.cache import writing_to
from regrow.trainer.data.config import DataConfig
from regrow.trainer.data.encoding import DocumentMarks, Encoded
from regrow.trainer.data.file_shards import (
    ShardPlace,
    check_unchanged,
    finish,
    kept_notes,
    locked,
    put_into_store,
)
from regrow.trainer.data.progress import showing_progress
from regrow.trainer.data.source import CorpusSource, DataError
from regrow.trainer.data.token_store import TOKENIZER, shard_is_complete, token_dtype, write_shard
from regrow.trainer.data.tokenizer import load_tokenizer
from regrow.trainer.process import die_with_parent

__all__ = ["Encoding", "write_shards"]

log = logging.getLogger(__name__)

# Shards whose bytes are compared at a time; the hash leaves other threads running.
_HASHING_THREADS = 8
# Parts that wait in the pool for each process; of a corpus of many small files not all.
_WAITING = 4
_SHOW_EVERY_S = 0.5
# Tokens after which the other process is told, so that telling costs nothing.
_TELL_TOKENS = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoding:
    """How text becomes ids.

    Attributes:
        tokenizer_hash: of the file in the store.
        marks: what stands around each document of text.
        vocab_size: one more than the largest id.
    """

    tokenizer_hash: str
    marks: DocumentMarks
    vocab_size: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """Holds every id."""
        return token_dtype(self.vocab_size)

    def identity(self) -> dict[str, str]:
        """What decides the bytes of a shard."""
        begin = {} if self.marks.begin is None else {"begin": str(self.marks.begin)}
        return {"tokenizer": self.tokenizer_hash, "end": str(self.marks.end), "dtype": self.dtype.str, **begin}


def write_shards(source: CorpusSource, places: Sequence[ShardPlace], encoding: Encoding, store: Path) -> None:
    """Tokenises the parts that were not tokenised yet and puts all shards into a store that has its tokenizer.

    Args:
        source: of the text.
        places: of the store's shards, in their order.
        encoding: with the tokenizer.
        store: its folder.

    Raises:
        DataError: a file cannot be read, or changes; or a process that tokenises dies.
        OSError: the store cannot be written.
    """
    todo = _not_there_yet(source, places, encoding)
    workers = min(source.config.workers or os.cpu_count() or 1, max(1, len(todo)))
    log.info("tokenising %d of %d parts of the corpus with %d processes", len(todo), len(places), workers)
    if todo:
        _tokenize(source, todo, encoding, store / TOKENIZER, workers)
    for number, place in enumerate(places):
        if place.content is not None:
            put_into_store(place, store, number)


def _not_there_yet(source: CorpusSource, places: Sequence[ShardPlace], encoding: Encoding) -> list[ShardPlace]:
    """The shards that are not there whole; what was noted of those that are is told."""
    todo: list[ShardPlace] = []
    # A shard that two files of the same content share is made for the first.
    kept = {(p.folder, p.number): p for p in places if p.content is not None}
    with ThreadPoolExecutor(_HASHING_THREADS) as threads:
        found = dict(zip(kept, threads.map(kept_notes, kept.values()), strict=True))
    for place in places:
        if place.content is None:
            if not shard_is_complete(place.folder, place.number, encoding.dtype, labels=source.HAS_LABELS):
                todo.append(place)
            continue
        notes = found[place.folder, place.number]
        if notes is not None:
            source.notes.merge(notes)
        elif kept.pop((place.folder, place.number), None) is not None:
            todo.append(place)
    return todo


def _tokenize(
    source: CorpusSource, todo: Sequence[ShardPlace], encoding: Encoding, tokenizer: Path, workers: int
) -> None:
    """Makes the shards in processes of their own."""
    tag_semaphores()
    context = multiprocessing.get_context("spawn")
    written = context.Value("Q")
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_begin_worker, initargs=(os.getpid(), written)
    )
    try:
        with showing_progress(sum(place.size_bytes for place in todo), len(todo)) as progress:
            waiting: dict[Future[_Made], ShardPlace] = {}
            left = iter(todo)
            while True:
                # Of a corpus of many small files not all wait in the pool at once.
                for place in itertools.islice(left, workers * _WAITING - len(waiting)):
                    job = pool.submit(_make_shard_here, type(source), source.config, place, encoding, tokenizer)
                    waiting[job] = place
                if not waiting:
                    break
                for job in wait(waiting, timeout=_SHOW_EVERY_S, return_when=FIRST_COMPLETED).done:
                    made = job.result()
                    source.notes.merge(made.notes)
                    progress.finish(waiting.pop(job).size_bytes, made.tokens)
                progress.show(written.value)
    except BrokenProcessPool as error:
        raise DataError(
            "data.workers must be so few that their memory suffices, but a process that tokenised was killed or "
            f"crashed (there were {workers}); use fewer, or shorter documents"
        ) from error
    finally:
        # On an error or a signal nobody waits for the parts that are left.
        pool.shutdown(wait=False, cancel_futures=True)


@final
class _Written:
    """How many tokens all processes have written, as each of them tells it."""

    counter: ClassVar[Any] = None

    @classmethod
    def counting(cls, documents: Iterable[Encoded]) -> Iterator[Encoded]:
        """The documents as they are, counted."""
        count = 0
        for document in documents:
            count += len(document.ids)
            if count >= _TELL_TOKENS:
                cls._add(count)
                count = 0
            yield document
        cls._add(count)

    @classmethod
    def _add(cls, count: int) -> None:
        if cls.counter is not None:
            with cls.counter.get_lock():
                cls.counter.value += count


def _begin_worker(parent_pid: int, written: Any) -> None:
    # Slurm signals every process of a step; what a warning means is for the parent to decide.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    die_with_parent(parent_pid)
    # One process per core already: the library's own threads would only be in each other's way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _Written.counter = written


class _Made(NamedTuple):
    """A shard that was written: its tokens, and what was noted of its documents."""

    tokens: int
    notes: dict[str, tuple[int, str]]


def _make_shard_here(
    kind: type[CorpusSource], config: DataConfig, place: ShardPlace, encoding: Encoding, tokenizer: Path
) -> _Made:
    """`make_shard`, with errors that can be sent to another process: what they say, without what they hold.

    Raises:
        DataError: see `make_shard`.
    """
    try:
        return make_shard(kind, config, place, encoding, tokenizer)
    except DataError as error:
        raise DataError(str(error)) from None


def make_shard(
    kind: type[CorpusSource], config: DataConfig, place: ShardPlace, encoding: Encoding, tokenizer: Path
) -> _Made:
    """Writes one shard; runs in a process of its own.

    Args:
        kind: of the source.
        config: of the source.
        place: where the shard is written; one that another process has made meanwhile is left as it is.
        encoding: with the tokenizer.
        tokenizer: its file.

    Raises:
        DataError: the part cannot be read, its file has changed, or the cache cannot be written.
    """
    source = kind(config)
    if place.content is None:
        return _Made(_write(source, place, encoding, tokenizer), source.notes.counts)
    with writing_to(place.folder, "data.cache"), locked(place):
        notes = kept_notes(place)
        if notes is not None:
            return _Made(0, notes)
        tokens = _write(source, place, encoding, tokenizer)
        check_unchanged(place, config)
        finish(place, source.notes.counts)
    return _Made(tokens, source.notes.counts)


def _write(source: CorpusSource, place: ShardPlace, encoding: Encoding, tokenizer: Path) -> int:
    documents = source.encode(place.part, _loaded(tokenizer, encoding.tokenizer_hash), encoding.marks)
    return write_shard(place.folder, place.number, _Written.counting(documents), encoding.dtype)


@functools.lru_cache(maxsize=1)
def _loaded(file: Path, _content: str) -> Tokenizer:
    """The tokenizer, which takes longer to load than a small file to tokenise."""
    return load_tokenizer(file)
