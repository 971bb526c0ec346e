"""From a source of text to a token store: in parallel, resumable, once per corpus and tokenizer.

Runs before any rank starts, so nothing here imports torch.
"""

import fcntl
import hashlib
import logging
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from trainer.data.config import DataConfig
from trainer.data.source import Source, TextUnits, Unit, digest
from trainer.data.token_store import (
    INDEX,
    TOKENIZER,
    shard_is_complete,
    token_dtype,
    write_index,
    write_shard,
)
from trainer.data.tokenizer import end_of_text_id, load_tokenizer, tokenizer_file, tokenizer_hash, train_bpe
from trainer.places import user_cache
from trainer.process import die_with_parent

__all__ = ["cache_folder", "prepare", "tokenize"]

log = logging.getLogger(__name__)
_BATCH = 64


def cache_folder(config: DataConfig) -> Path:
    """Where tokenised corpora are kept."""
    if config.cache is not None:
        return Path(config.cache).expanduser()
    return user_cache()


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Makes a second process that prepares the same corpus wait for the first."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def prepare(source: Source) -> Path:
    """The folder of the source's token store, made now if it does not exist.

    Raises:
        ValueError: the corpus is empty or cannot be read.
    """
    ready = source.prepared()
    if ready is not None:
        return ready
    assert isinstance(source, TextUnits)
    config = source.config
    if config.tokenizer is not None:
        spec = tokenizer_hash(tokenizer_file(config.tokenizer))
    else:
        spec = f"bpe-{config.tokenizer_vocab_size}"
    folder = cache_folder(config) / "tokens" / digest(source.key(), spec, config.eos_token or "")
    if not (folder / INDEX).exists():
        with _only_one(folder):
            if not (folder / INDEX).exists():
                tokenize(source, folder)
    return folder


def _place_tokenizer(source: TextUnits, units: list[Unit], folder: Path) -> Path:
    """Copies or trains the tokenizer into the store; with it, what names its end-of-text token."""
    placed = folder / TOKENIZER
    if placed.exists():
        return placed
    if source.config.tokenizer is None:
        log.info("training a byte-level BPE with %d tokens", source.config.tokenizer_vocab_size)
        train_bpe((d for u in units for d in source.read(u)), source.config.tokenizer_vocab_size, placed)
        return placed
    given = tokenizer_file(source.config.tokenizer)
    beside = given.with_name("tokenizer_config.json")
    if beside.is_file():
        shutil.copyfile(beside, folder / beside.name)
    temporary = placed.with_suffix(".tmp")
    shutil.copyfile(given, temporary)
    temporary.rename(placed)
    return placed


def tokenize(source: TextUnits, folder: Path) -> None:
    """Writes the source's token store into `folder`; shards that are there already are kept.

    Raises:
        ValueError: the corpus is empty.
    """
    units = source.units()
    if not units:
        raise ValueError(f"data: the corpus ({source.config._target_}) must not be empty, but has no text; check it")
    folder.mkdir(parents=True, exist_ok=True)
    file = _place_tokenizer(source, units, folder)
    tokenizer = load_tokenizer(file)
    end_of_text_id(tokenizer, file, source.config.eos_token)
    todo = [i for i in range(len(units)) if not shard_is_complete(folder, i)]
    workers = min(source.config.workers or os.cpu_count() or 1, max(1, len(todo)))
    log.info("tokenising %d parts of the corpus with %d processes", len(todo), workers)
    with _progress(len(units)) as bar:
        bar.advance(bar.task_ids[0], len(units) - len(todo))
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker, initargs=(os.getpid(),))
        try:
            jobs = [pool.submit(tokenize_unit, type(source), source.config, units[i], i, folder) for i in todo]
            for job in as_completed(jobs):
                job.result()
                bar.advance(bar.task_ids[0])
        finally:
            # On an error or a signal nobody waits for the parts that are left.
            pool.shutdown(wait=False, cancel_futures=True)
    index = write_index(folder, len(units), tokenizer.get_vocab_size(), tokenizer_hash(file))
    if index.documents == 0:
        (folder / INDEX).unlink()
        raise ValueError(f"data: the corpus ({source.config._target_}) must not be empty, but has no text; check it")
    log.info("tokenised %d documents, %d tokens", index.documents, index.tokens)


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


def tokenize_unit(kind: type[TextUnits], config: DataConfig, unit: Unit, shard: int, folder: Path) -> int:
    """Writes one shard; runs in a process of its own."""
    # One process per core already: the library's own threads would only be in each other's way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    file = folder / TOKENIZER
    tokenizer = load_tokenizer(file)
    end = end_of_text_id(tokenizer, file, config.eos_token)
    dtype = token_dtype(tokenizer.get_vocab_size())
    return write_shard(folder, shard, _encode(kind(config).read(unit), tokenizer, end), dtype)


def _encode(documents: Iterator[str], tokenizer: Tokenizer, end: int) -> Iterator[tuple[npt.NDArray[Any], int]]:
    while batch := list(islice(documents, _BATCH)):
        for text, encoding in zip(batch, tokenizer.encode_batch(batch, add_special_tokens=False), strict=True):
            if encoding.ids:
                content = hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest()
                yield np.array([*encoding.ids, end]), int.from_bytes(content, "little")
