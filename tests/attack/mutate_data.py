"""Mutated tokenizers, token stores and corpora, each read by our own reader.

`make_samples` writes small sound inputs once; `mutations` yields as many damaged ones as are wanted. A case's name and
the seed give it again.
"""

import contextlib
import gzip
import itertools
import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from regrow.trainer.data.config import TextConfig, TokensConfig
from regrow.trainer.data.encoding import DocumentMarks, Encoded, encode_documents
from regrow.trainer.data.recipe import RECIPE, check_recipe
from regrow.trainer.data.source import DataError
from regrow.trainer.data.text import TextSource
from regrow.trainer.data.token_store import INDEX, TOKENIZER, TokensSource, TokenStore, write_index, write_shard
from regrow.trainer.data.tokenizer import (
    TOKENIZER_CONFIG,
    end_of_text_id,
    load_tokenizer,
    tokenizer_hash,
    train_bpe,
    vocabulary_size,
)
from regrow.trainer.data.windows import ConcatWindows

__all__ = ["corpus_mutations", "make_samples", "mutations", "store_mutations", "tokenizer_mutations"]

Case = tuple[str, Callable[[], str]]
_WORDS = ("alpha", "beta", "gamma", "delta", "épsilon", "ζeta", "你好", "🙂")
_ODD_NUMBERS = (0, -1, 1, 2**16, 2**31, 2**32 - 1, 2**32, 2**63, 2**64, 10**30, 0.5, float("nan"), float("inf"))
_ODD_VALUES: tuple[Any, ...] = (None, True, "", "x" * 5000, "\ud800", "../../x", "\0", [], {}, [[]], {"type": "BPE"})


def make_samples(folder: Path) -> None:
    """Small sound inputs: the folders of two tokenizers, a token store of two shards, and a corpus in every format."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices(_WORDS, k=3 + n % 20)) for n in range(60)]
    unigram = folder / "unigram"
    unigram.mkdir(parents=True)
    _train_unigram(texts, unigram / TOKENIZER)
    (unigram / TOKENIZER_CONFIG).write_text(json.dumps({"eos_token": "</s>"}))
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    train_bpe(texts, 290, tokenizer / TOKENIZER)
    (tokenizer / TOKENIZER_CONFIG).write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}, "n": [1, {}]}))
    store = folder / "store"
    shutil.copytree(tokenizer, store)
    check_recipe(store, {"data.field": "text", "the text": "0123"})
    for shard in range(2):
        rows = [Encoded(np.arange(3 + n) % 280, rng.getrandbits(64)) for n in range(30)]
        write_shard(store, shard, rows, np.dtype("<u2"))
    write_index(store, 2, 290, tokenizer_hash((store / TOKENIZER).read_bytes()), 0)
    _write_corpus(folder / "corpus", texts)


def _train_unigram(texts: list[str], file: Path) -> None:
    """A tokenizer with one of most of the library's parts."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " "), normalizers.Prepend("▁")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("[a-z]+"), "isolated"), pre_tokenizers.Metaspace(), pre_tokenizers.Digits()]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.enable_padding(pad_token="</s>", pad_id=2)
    tokenizer.enable_truncation(8, stride=2)
    tokenizer.save(str(file))


def _write_corpus(folder: Path, texts: list[str]) -> None:
    folder.mkdir()
    body = "".join(json.dumps({"text": t, "n": i, "of": {"a": [i]}}) + "\n" for i, t in enumerate(texts)).encode()
    (folder / "a.jsonl").write_bytes(body)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(body, mtime=0))
    (folder / "a.jsonl.zst").write_bytes(zstandard.compress(body))
    (folder / "a.txt").write_text("\n\n".join(texts))
    table = pa.table({"text": texts, "bytes": [t.encode() for t in texts], "n": list(range(len(texts)))})
    pq.write_table(table, folder / "a.parquet", row_group_size=25)


def _mutate_bytes(rng: random.Random, body: bytes) -> tuple[str, bytes]:
    """One of the damages that disks, networks and people do to bytes."""
    at, length = rng.randrange(len(body) + 1), rng.choice((1, 2, 8, 64, 1024))
    other = rng.randrange(len(body) + 1)
    changed: dict[str, Callable[[], bytes]] = {
        "cut": lambda: body[:at],
        "bit": lambda: body[: max(0, at - 1)] + bytes([body[at - 1] ^ 1 << rng.randrange(8)]) + body[at:],
        "noise": lambda: body[:at] + rng.randbytes(length) + body[at + length :],
        "zeros": lambda: body[:at] + bytes(length) + body[at + length :],
        "ones": lambda: body[:at] + b"\xff" * length + body[at + length :],
        "inserted": lambda: body[:at] + rng.randbytes(length) + body[at:],
        "removed": lambda: body[:at] + body[at + length :],
        "swapped": lambda: body[:at] + body[other : other + length] + body[at + length :],
        "twice": lambda: body + body,
        "tail": lambda: body + rng.randbytes(length),
        "huge number": lambda: body[:at] + struct.pack("<Q", rng.choice((2**31, 2**40, 2**63))) + body[at + 8 :],
        "empty": lambda: b"",
        "byte order mark": lambda: rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\xff\xfe\0\0")) + body,
        "deep": lambda: body[:at] + b"[" * 100_000 + body[at:],
        "long line": lambda: body[:at] + b"a" * 300_000 + body[at:],
    }
    how = rng.choice([*changed])
    return how, changed[how]()


def _mutate_json(rng: random.Random, body: bytes) -> tuple[str, bytes]:
    """A document of which one value was removed, or replaced by one of another type or size."""
    document = json.loads(body)
    holder, key, path = _pick(rng, document)
    value = holder[key]
    odd = rng.choice((*_ODD_NUMBERS, *_ODD_VALUES))
    how = rng.choice(("removed", "odd", "odd", "nested", "many", "doubled"))
    if how == "removed":
        del holder[key]
    elif how == "nested":
        holder[key] = [value]
    elif how == "many":
        holder[key] = [odd] * 1000
    elif how == "doubled" and isinstance(value, int | str | list):
        holder[key] = value * 2
    else:
        holder[key] = odd
    return f"{how} {path[:60]!a} {ascii(odd)[:20] if how in ('odd', 'many') else ''}", json.dumps(document).encode()


def _pick(rng: random.Random, document: Any) -> tuple[Any, Any, str]:
    """A value of a document, each level as likely as the next: its holder, key and path."""
    holder, path = document, ""
    while True:
        key = rng.choice([*holder]) if isinstance(holder, dict) else rng.randrange(len(holder))
        path += f"/{key!r}"
        below = holder[key]
        if not isinstance(below, dict | list) or not below or rng.random() < 0.3:
            return holder, key, path
        holder = below


def _mutate(rng: random.Random, file: Path, share_of_json: float) -> tuple[str, bytes]:
    body = file.read_bytes()
    if file.suffix == ".json" and rng.random() < share_of_json:
        return _mutate_json(rng, body)
    return _mutate_bytes(rng, body)


def _sentence(read: Callable[[], str]) -> Callable[[], str]:
    """What a reader says: its result, or the one sentence of a refusal. Anything else that is raised is a fault."""

    def run() -> str:
        try:
            return read()
        except (DataError, FileNotFoundError) as error:
            sentence = str(error)
            assert sentence.isprintable(), "a sentence is one line that can be printed"
            assert len(sentence) < 2000, "a sentence is short"
            return f"refused: {sentence}"

    return run


def tokenizer_mutations(rng: random.Random, samples: Path, work: Path) -> Iterator[Case]:
    """Tokenizers: loaded, asked for their largest id and end of text, and made to encode."""
    for n in itertools.count():
        sample = samples / rng.choice(("tokenizer", "unigram"))
        name = rng.choice((TOKENIZER, TOKENIZER, TOKENIZER, TOKENIZER_CONFIG))
        how, body = _mutate(rng, sample / name, 0.8)

        def read(n: int = n, sample: Path = sample, name: str = name, body: bytes = body) -> str:
            folder = work / f"tokenizer-{n}"
            shutil.copytree(sample, folder)
            (folder / name).write_bytes(body)
            with _removed(folder):
                tokenizer = load_tokenizer(folder / TOKENIZER)
                end, size = end_of_text_id(tokenizer, folder / TOKENIZER, None), vocabulary_size(tokenizer)
                texts = [" ".join(_WORDS), "x" * 1000, "\n"]
                ids = [e.ids for e in encode_documents(iter(texts), tokenizer, DocumentMarks(end))]
                assert all(0 <= int(i.max()) < size for i in ids)
                return f"{len(ids)} documents"

        yield f"tokenizer {n}: {sample.name}/{name} {how}", _sentence(read)


def store_mutations(rng: random.Random, samples: Path, work: Path) -> Iterator[Case]:
    """Token stores: opened as `data=tokens` opens them, and read to the end; their recipe compared."""
    names = (INDEX, INDEX, INDEX, RECIPE, TOKENIZER, "shard-00000.documents.npy", "shard-00001.tokens")
    for n in itertools.count():
        name = rng.choice(names)
        how, body = _mutate(rng, samples / "store" / name, 0.8)

        def read(n: int = n, name: str = name, body: bytes = body) -> str:
            folder = work / f"store-{n}"
            shutil.copytree(samples / "store", folder)
            (folder / name).write_bytes(body)
            with _removed(folder):
                check_recipe(folder, {"data.field": "text", "the text": "0123"})
                source = TokensSource(TokensConfig(path=str(folder)))
                source.check()
                store = TokenStore(source.prepared())
                windows = ConcatWindows(store, 16, 0.0, validation=False)
                out, labels = np.zeros((2, 16), dtype=np.int64)
                for window in range(len(windows)):
                    windows.read(window, out, labels, None)
                    assert 0 <= int(out.min()) <= int(out.max()) < store.index.vocab_size
                return f"{len(windows)} windows"

        yield f"store {n}: {name} {how}", _sentence(read)


def corpus_mutations(rng: random.Random, samples: Path, work: Path) -> Iterator[Case]:
    """Corpora: looked at, identified, cut into parts and read."""
    files = sorted((samples / "corpus").iterdir())
    for n in itertools.count():
        file = rng.choice(files)
        field = rng.choice(("text", "text", "text", "bytes" if file.suffix == ".parquet" else "n"))
        body = file.read_bytes()
        if file.suffix in (".gz", ".zst") and rng.random() < 0.4:
            # Sound compression around what is not.
            how, body = _mutate_bytes(rng, (samples / "corpus" / "a.jsonl").read_bytes())
            body = gzip.compress(body) if file.suffix == ".gz" else zstandard.compress(body)
        else:
            how, body = _mutate_bytes(rng, body)

        def read(n: int = n, name: str = file.name, field: str = field, body: bytes = body) -> str:
            folder = work / f"corpus-{n}"
            folder.mkdir()
            (folder / name).write_bytes(body)
            with _removed(folder):
                config = TextConfig(
                    files=[f"{folder}/*"], field=field, cache=str(folder / "c"), txt_document_bytes=200
                )
                source = TextSource(config)
                source.check()
                assert source.key()
                texts = [t for unit in source.units() for t in source.read(unit)]
                "".join(texts).encode()  # no half of a surrogate pair
                return f"{len(texts)} documents, {sum(c for c, _ in source.notes.counts.values())} notes"

        yield f"corpus {n}: {file.name} {how}", _sentence(read)


@contextlib.contextmanager
def _removed(folder: Path) -> Iterator[None]:
    try:
        yield
    finally:
        shutil.rmtree(folder)


def mutations(rng: random.Random, samples: Path, work: Path) -> Iterator[Case]:
    """All kinds in turn, without an end.

    Args:
        rng: decides everything.
        samples: made by `make_samples`.
        work: an existing folder; each case makes a folder in it and removes it.
    """
    kinds = (tokenizer_mutations, store_mutations, corpus_mutations)
    yield from (case for cases in zip(*(k(rng, samples, work) for k in kinds), strict=True) for case in cases)
