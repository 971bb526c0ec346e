"""Order, token stores, windows, batches, sources, tokenizers."""

import gzip
import itertools
import json
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard
from hypothesis import given, settings

from regrow.trainer.data.config import StdlibConfig, TextConfig
from regrow.trainer.data.encoding import Encoded
from regrow.trainer.data.loader import Prefetcher, step_batch
from regrow.trainer.data.order import Ids, permute, rank_rows, window_ids
from regrow.trainer.data.prepare import prepare, tokenize
from regrow.trainer.data.samples import Samples
from regrow.trainer.data.source import CorpusPart
from regrow.trainer.data.stdlib import StdlibSource
from regrow.trainer.data.text import TextSource
from regrow.trainer.data.token_store import TOKENIZER, TokenStore, shard_is_complete, write_index, write_shard
from regrow.trainer.data.tokenizer import END_OF_TEXT, load_tokenizer, tokenizer_hash, train_bpe
from regrow.trainer.data.windows import IGNORE, ConcatWindows


def in_order(positions: Ids, n: int, seed: int) -> Ids:
    """The windows of one source."""
    return window_ids(positions, np.array([n]), [seed], np.zeros(len(positions), dtype=np.int64))


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 9))
def test_the_order_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    assert sorted(permute(np.arange(n), n, seed, epoch)) == list(range(n))


def test_the_order_depends_on_seed_and_epoch_and_is_not_the_identity() -> None:
    orders = [permute(np.arange(1000), 1000, s, e).tolist() for s, e in ((0, 0), (0, 1), (1, 0))]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    fixed = sum(i == w for i, w in enumerate(orders[0]))
    assert fixed < 10


def test_a_huge_corpus_needs_no_index() -> None:
    ids = in_order(10**12 + np.arange(8), 10**13, 0)
    assert len(set(ids.tolist())) == 8
    assert ids.max() > 10**11


@given(n=st.integers(1, 50), first=st.integers(0, 300), counts=st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_batches_straddle_epochs_and_cut_anywhere(n: int, first: int, counts: list[int]) -> None:
    whole = in_order(first + np.arange(sum(counts)), n, 5)
    parts, position = [], first
    for count in counts:
        parts.append(in_order(position + np.arange(count), n, 5))
        position += count
    assert np.array_equal(whole, np.concatenate(parts))


def test_each_epoch_sees_each_window_once() -> None:
    ids = in_order(np.arange(30), 10, 1).reshape(3, 10)
    assert all(sorted(row) == list(range(10)) for row in ids.tolist())
    assert len({tuple(row) for row in ids.tolist()}) == 3


@given(total=st.integers(1, 200), ranks=st.integers(1, 40))
def test_ranks_share_the_rows(total: int, ranks: int) -> None:
    slices = [rank_rows(total, r, ranks) for r in range(ranks)]
    assert [i for a, b in slices for i in range(a, b)] == list(range(total))
    sizes = [b - a for a, b in slices]
    assert max(sizes) - min(sizes) <= 1


def make_store(folder: Path, documents: list[list[int]], shards: int = 1) -> TokenStore:
    folder.mkdir(parents=True, exist_ok=True)
    train_bpe(["some text for a tokenizer"] * 3, 270, folder / TOKENIZER)
    bounds = [i * len(documents) // shards for i in range(shards + 1)]
    rng = np.random.default_rng(0)
    for shard, (a, b) in enumerate(itertools.pairwise(bounds)):
        rows = [Encoded(np.array(d), int(rng.integers(2**63)) * 2) for d in documents[a:b]]
        write_shard(folder, shard, rows, np.dtype("<u2"))
    write_index(folder, shards, 65536, tokenizer_hash((folder / TOKENIZER).read_bytes()), 0)
    return TokenStore(folder)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=40),
    shards=st.integers(1, 3),
    seq_len=st.integers(1, 7),
    fraction=st.sampled_from([0.0, 0.3, 0.6]),
)
def test_windows_read_the_splits_stream(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], shards: int, seq_len: int, fraction: float
) -> None:
    documents, token = [], 0
    for length in lengths:
        documents.append(list(range(token, token + length)))
        token += length
    store = make_store(tmp_path_factory.mktemp("store"), documents, shards)
    total = 0
    for validation in (False, True):
        windows = ConcatWindows(store, seq_len, fraction, validation=validation)
        held = store.hashes < np.uint64(int(fraction * 2**64))
        mine = [d for d, h in zip(documents, held, strict=True) if bool(h) is validation]
        stream = [t for d in mine for t in d]
        owner = [i for i, d in enumerate(mine) for _ in d]
        total += len(stream)
        assert len(windows) == max(0, (len(stream) - 1) // seq_len)
        for w in range(len(windows)):
            tokens, labels, found = (np.zeros(seq_len, dtype=np.int64) for _ in range(3))
            windows.read(w, tokens, labels, found)
            assert [*tokens.tolist(), labels[-1]] == stream[w * seq_len : (w + 1) * seq_len + 1]
            assert labels[:-1].tolist() == tokens[1:].tolist()
            owners = np.array(owner[w * seq_len : (w + 1) * seq_len])
            assert np.array_equal(found, owners - owners[0])
        assert windows.labels(np.arange(len(windows))).tolist() == [seq_len] * len(windows)
    assert total == sum(lengths)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    store = make_store(tmp_path_factory.mktemp("w"), [list(range(i, i + 20)) for i in range(0, 200, 20)])
    return Samples([""], [ConcatWindows(store, 8, 0.0, validation=False)], [0])


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("size", [1, 7, 12])
def test_any_number_of_ranks_takes_any_global_batch(samples: Samples, ranks: int, size: int) -> None:
    ids = samples.ids(3, size)
    parts = [
        step_batch(samples, ids, rank=r, ranks=ranks, micro_batch_size=2, document_mask=True) for r in range(ranks)
    ]
    assert len({len(p.micro_batches) for p in parts}) == 1
    assert np.array_equal(np.concatenate([p.ids.windows for p in parts]), ids.windows)
    valid = sum(int((m.labels != IGNORE).sum()) for p in parts for m in p.micro_batches)
    assert valid == size * samples.seq_len
    assert {tuple(p.labels.tolist()) for p in parts} == {(valid,)}
    for part in parts:
        for micro_batch in part.micro_batches:
            assert micro_batch.documents is not None
            assert micro_batch.tokens.shape == micro_batch.labels.shape == micro_batch.documents.starts.shape


def test_labels_are_the_next_tokens(samples: Samples) -> None:
    batch = step_batch(samples, samples.ids(4, 1), rank=0, ranks=1, micro_batch_size=1, document_mask=False)
    (micro_batch,) = batch.micro_batches
    assert torch.equal(micro_batch.tokens[0, 1:], micro_batch.labels[0, :-1])
    assert micro_batch.documents is None


def prefetcher(samples: Samples, consumed: int, micro_batch_size: int = 5) -> Prefetcher:
    return Prefetcher(
        samples,
        samples_consumed=consumed,
        global_batch_size=5,
        rank=0,
        ranks=1,
        micro_batch_size=micro_batch_size,
        document_mask=False,
        depth=2,
    )


def test_prefetching_continues_where_it_is_told(samples: Samples) -> None:
    a, b = prefetcher(samples, 0), prefetcher(samples, 10)
    first = [next(a).ids.windows.tolist() for _ in range(4)]
    second = [next(b).ids.windows.tolist() for _ in range(2)]
    a.close()
    b.close()
    assert first[2:] == second


def test_an_error_while_reading_ahead_reaches_the_step(samples: Samples) -> None:
    batches = prefetcher(samples, 0, micro_batch_size=0)
    with pytest.raises(ValueError, match="must not be zero"):
        next(batches)
    batches.close()


def write_sources(folder: Path) -> dict[str, Path]:
    rows = [json.dumps({"text": f"document {i} in english", "other": i}) for i in range(30)]
    body = ("\n".join(rows) + "\n").encode()
    paths = {end: folder / f"a{end}" for end in (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt")}
    paths[".jsonl"].write_bytes(body)
    paths[".jsonl.gz"].write_bytes(gzip.compress(body))
    paths[".jsonl.zst"].write_bytes(zstandard.compress(body))
    texts = [json.loads(r)["text"] for r in rows]
    pq.write_table(pa.table({"text": texts}), paths[".parquet"], row_group_size=7)
    paths[".txt"].write_text("\n\n".join(texts) + "\n")
    return paths


@pytest.mark.parametrize("end", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_every_format_gives_the_same_documents(tmp_path: Path, end: str) -> None:
    source = TextSource(TextConfig(files=[str(write_sources(tmp_path)[end])]))
    documents = [d for u in source.units() for d in source.read(u)]
    assert documents == [f"document {i} in english" for i in range(30)]


@given(cuts=st.lists(st.integers(0, 1500), max_size=5))
def test_any_cut_of_a_file_reads_each_line_once(tmp_path_factory: pytest.TempPathFactory, cuts: list[int]) -> None:
    path = write_sources(tmp_path_factory.mktemp("cut"))[".jsonl"]
    source = TextSource(TextConfig(files=[str(path)]))
    edges = sorted({0, *cuts, path.stat().st_size + 1})
    documents = [d for a, b in itertools.pairwise(edges) for d in source.read(CorpusPart(str(path), a, b))]
    assert documents == [f"document {i} in english" for i in range(30)]


def test_text_files_are_cut_at_blank_lines(tmp_path: Path) -> None:
    path = write_sources(tmp_path)[".txt"]
    source = TextSource(TextConfig(files=[str(path)], txt_document_bytes=60))
    documents = [d for u in source.units() for d in source.read(u)]
    assert len(documents) > 5
    assert "".join(documents) == path.read_text()
    whole = TextSource(TextConfig(files=[str(path)], txt_document_bytes=0))
    assert [d for u in whole.units() for d in whole.read(u)] == [path.read_text()]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (TextConfig(files=[]), "data.files must name at least one file"),
        (TextConfig(files=["nothing-*.txt"]), "nothing-*.txt matches none"),
        (TextConfig(files=[__file__]), "data.files must end in one of .txt"),
    ],
)
def test_bad_files_are_refused(config: TextConfig, words: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        TextSource(config).check()
    assert words in str(caught.value)


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    paths = write_sources(tmp_path)
    for end in (".jsonl", ".parquet"):
        source = TextSource(TextConfig(files=[str(paths[end])], field="body"))
        with pytest.raises(ValueError, match=r"data\.field"):
            [d for u in source.units() for d in source.read(u)]


def test_preparing_is_done_once_and_resumes(tmp_path: Path) -> None:
    config = TextConfig(
        files=[str(write_sources(tmp_path)[".parquet"])],
        tokenizer_vocab_size=280,
        workers=1,
        cache=str(tmp_path / "c"),
    )
    folder = prepare(TextSource(config))
    store = TokenStore(folder)
    assert (store.index.documents, store.index.shards) == (30, 5)
    tokenizer = load_tokenizer(store.tokenizer_file)
    out = np.zeros(int(store.lengths[0]), dtype=np.int64)
    store.read(0, out)
    assert tokenizer.decode(out[:-1].tolist()) == "document 0 in english"
    assert out[-1] == tokenizer.token_to_id(END_OF_TEXT)
    made = (folder / "index.json").stat().st_mtime_ns
    assert prepare(TextSource(config)) == folder
    assert (folder / "index.json").stat().st_mtime_ns == made
    # Lost shards are made again, and come out the same.
    (folder / "index.json").unlink()
    (folder / "shard-00002.documents.npy").unlink()
    kept = (folder / "shard-00001.tokens").stat().st_mtime_ns
    tokenize(TextSource(config), folder)
    assert shard_is_complete(folder, 2, np.dtype(store.index.dtype))
    assert (folder / "shard-00001.tokens").stat().st_mtime_ns == kept
    assert TokenStore(folder).index.fingerprint == store.index.fingerprint


def test_a_given_tokenizer_is_used_and_its_end_found(tmp_path: Path) -> None:
    folder = tmp_path / "tok"
    folder.mkdir()
    train_bpe(["words and words"] * 5, 262, folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": END_OF_TEXT}}))
    files = [str(write_sources(tmp_path)[".jsonl"])]
    config = TextConfig(files=files, tokenizer=str(folder), workers=1, cache=str(tmp_path / "c"))
    store = TokenStore(prepare(TextSource(config)))
    assert store.tokenizer_file.read_bytes() == (folder / "tokenizer.json").read_bytes()


@pytest.mark.slow
def test_bpe_training_repeats(tmp_path: Path) -> None:
    source = StdlibSource(StdlibConfig())
    texts = list(source.read(source.units()[0]))[:60]
    for name in ("a.json", "b.json"):
        train_bpe(texts, 600, tmp_path / name)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_the_standard_library_is_english_and_code() -> None:
    source = StdlibSource(StdlibConfig())
    topics = "\n".join(source.read(source.units()[0]))
    code = "\n".join(source.read(source.units()[1]))
    assert topics.count(" the ") > 2000
    assert code.count("def ") > 300


@pytest.mark.slow
def test_the_data_command_makes_a_store(tmp_path: Path) -> None:
    files = str(write_sources(tmp_path)[".jsonl.zst"])
    command = [sys.executable, "-P", "-m", "regrow.launch.commands.data"]
    arguments = ["tokenize", str(tmp_path / "out"), files, "--vocab-size", "280", "--workers", "1"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True)
    assert "30 documents" in done.stdout
    again = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True)
    assert again.stdout == done.stdout
    other = subprocess.run([*command, "tokenize", str(tmp_path), files], capture_output=True, text=True, check=False)
    assert other.returncode == 2
    assert other.stderr.startswith("error: OUT must be an empty folder")
