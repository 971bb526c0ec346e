"""Tokenising by file: what is added, and nothing else, is tokenised; and a store is the same whoever made its shards."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import obstore
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from regrow.trainer.data import file_shards
from regrow.trainer.data.chat.source import ChatSource
from regrow.trainer.data.config import ChatConfig, OnBadRecord, TextConfig
from regrow.trainer.data.corpus_content import files_content
from regrow.trainer.data.corpus_paths import find_files
from regrow.trainer.data.encoding import DocumentMarks, Encoded
from regrow.trainer.data.prepare import prepare, tokenize
from regrow.trainer.data.progress import Amount, showing_progress
from regrow.trainer.data.recipe import file_key
from regrow.trainer.data.source import CorpusPart, CorpusSource, DataError, digest
from regrow.trainer.data.text import TextSource
from regrow.trainer.data.token_store import TokenStore, write_index, write_shard
from regrow.trainer.data.tokenizer import (
    end_of_text_id,
    load_tokenizer,
    tokenizer_hash,
    train_bpe,
    vocabulary_size,
)
from regrow.trainer.data.tokenizing import Encoding, make_shard
from tests.s3_server import s3_server
from tests.support import REPO

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|endoftext|>{% endfor %}"
ONE = "import sys; from regrow.trainer.data.prepare import prepare; " \
    "from regrow.trainer.data.text import TextSource; from regrow.trainer.data.config import TextConfig; " \
    "print(prepare(TextSource(TextConfig(files=sys.argv[3:], tokenizer=sys.argv[1], cache=sys.argv[2], workers=1))))"  # fmt: skip


def documents(name: str, count: int = 40) -> str:
    lines = [
        {"text": " ".join(f"{name} alpha {n * 7919 % 1000}" for n in range(k, k + k % 9 + 1))} for k in range(count)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe([documents(name) for name in "abcdef"], 290, folder / "tokenizer.json")
    config = {"eos_token": "<|endoftext|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def base(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files, and a cache in which all but the last were tokenised."""
    folder = tmp_path_factory.mktemp("base")
    for name in "abcdefg":
        (folder / f"{name}.jsonl").write_text(documents(name))
    prepare(text(folder, tokenizer, "abcdef"))
    return folder


@pytest.fixture
def work(base: Path, tmp_path: Path) -> Path:
    """A copy that may change."""
    shutil.copytree(base, tmp_path / "w")
    return tmp_path / "w"


def text(work: Path, tokenizer: Path, names: str, **options: Any) -> TextSource:
    files = [str(work / f"{name}.jsonl") for name in names]
    return TextSource(
        TextConfig(files=files, tokenizer=str(tokenizer), cache=str(work / "cache"), workers=1, **options)
    )


def kept(work: Path) -> dict[Path, tuple[int, int]]:
    """What the cache keeps of files: inode and time by path."""
    return {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in (work / "cache/files").rglob("shard-*")}


def records(work: Path) -> set[Path]:
    return set((work / "cache/files").rglob("shard-*.json"))


def contents(store: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in store.iterdir()}


def reference(source: CorpusSource, folder: Path) -> dict[str, bytes]:
    """A store's files, made part by part from the first to the last."""
    file = Path(str(source.config.tokenizer)) / "tokenizer.json"
    loaded, parts = load_tokenizer(file), source.units()
    end = end_of_text_id(loaded, file, None)
    folder.mkdir(parents=True)
    for number, part in enumerate(parts):
        write_shard(folder, number, source.encode(part, loaded, DocumentMarks(end)), np.dtype("<u2"))
    hashed = tokenizer_hash(file.read_bytes())
    write_index(folder, len(parts), vocabulary_size(loaded), hashed, end, labels=source.HAS_LABELS)
    return contents(folder)


def is_as_from_scratch(store: Path, source: CorpusSource, folder: Path) -> bool:
    """Whether all bytes are, the index with its fingerprint included."""
    beside = {".lock", "corpus.json", "tokenizer.json", "tokenizer_config.json"}
    found = {name: body for name, body in contents(store).items() if name not in beside}
    return found == reference(source, folder) and TokenStore(store).index.documents > 0


def test_only_what_is_new_is_tokenised(work: Path, tokenizer: Path, tmp_path: Path) -> None:
    seen = kept(work)
    assert len(seen) == 3 * 6
    for n, (names, new) in enumerate([("abcdefg", 1), ("gfedcba", 0), ("c", 0), ("eg", 0), ("aagb", 0)]):
        source = text(work, tokenizer, names)
        store = prepare(source)
        found = kept(work)
        assert len(found) - len(seen) == 3 * new
        assert seen.items() <= found.items(), "what was there is not made again"
        assert is_as_from_scratch(store, source, tmp_path / f"other-{n}")
        assert TokenStore(store).index.documents == 40 * len(set(names))
        seen = found
    (work / "b.jsonl").write_text(documents("changed"))
    store = prepare(text(work, tokenizer, "abc"))
    assert len(kept(work)) == len(seen) + 3
    assert is_as_from_scratch(store, text(work, tokenizer, "abc"), tmp_path / "other")
    (work / "b.jsonl").write_text(documents("b"))
    assert prepare(text(work, tokenizer, "abc")) != store
    assert len(kept(work)) == len(seen) + 3


def test_a_files_name_and_place_do_not_matter(work: Path, tokenizer: Path) -> None:
    before = records(work)
    (work / "a.jsonl").rename(work / "moved.jsonl")
    shutil.copy(work / "moved.jsonl", work / "twice.jsonl")
    source = text(work, tokenizer, "b")
    source.config.files = [str(work / "moved.jsonl"), str(work / "twice.jsonl")]
    store = prepare(source)
    assert records(work) == before
    assert TokenStore(store).index.documents == 80
    assert (store / "shard-00000.tokens").samefile(store / "shard-00001.tokens")


def test_labels_are_kept_with_their_files(work: Path, tokenizer: Path, tmp_path: Path) -> None:
    for name in "ab":
        chats = [
            [{"role": "user", "content": name}, {"role": "assistant", "content": f"{name} {n}"}] for n in range(9)
        ]
        (work / f"{name}.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))

    def chat(names: str) -> ChatSource:
        files = [str(work / f"{name}.jsonl") for name in names]
        return ChatSource(ChatConfig(files=files, tokenizer=str(tokenizer), cache=str(work / "cache"), workers=1))

    prepare(chat("ab"))
    seen = kept(work)
    store = prepare(chat("ba"))
    assert kept(work) == seen
    assert is_as_from_scratch(store, chat("ba"), tmp_path / "other")
    assert {"shard-00000.labels", "shard-00001.labels"} < set(contents(store))
    assert TokenStore(store).labels is not None


def damaged(body: bytes) -> bytes:
    # In its last bytes are the ids of a document, its hash, or the end of the record.
    return body[:-1] + bytes([body[-1] ^ 1])


DAMAGE: list[tuple[str, Any]] = [
    (".tokens", lambda path: path.write_bytes(damaged(path.read_bytes()))),
    (".documents.npy", lambda path: path.write_bytes(damaged(path.read_bytes()))),
    (".json", lambda path: path.write_bytes(damaged(path.read_bytes()))),
    (".tokens", Path.unlink),
    (".json", Path.unlink),
    (".json", lambda path: path.write_text('{"tokens": "../x", "documents": 5, "labels": null, "notes": {}}')),
]


def test_what_is_damaged_is_made_again_and_nothing_else(work: Path, tokenizer: Path, tmp_path: Path) -> None:
    prepare(text(work, tokenizer, "abcdefg"))
    seen, whole = kept(work), {path: path.read_bytes() for path in kept(work)}
    sound, *victims = sorted(path.with_suffix("") for path in records(work))
    for victim, (suffix, change) in zip(victims, DAMAGE, strict=True):
        change(Path(f"{victim}{suffix}"))
    source = text(work, tokenizer, "gfedcba")
    store = prepare(source)
    again = kept(work)
    assert {path: path.read_bytes() for path in again} == whole
    assert {path.parent for path in seen if again[path] != seen[path]} == {victim.parent for victim in victims}
    assert sound.parent not in {victim.parent for victim in victims}
    assert is_as_from_scratch(store, source, tmp_path / "other")


def test_a_store_whose_list_of_documents_is_damaged_is_not_made_of_the_same_again(
    work: Path, tokenizer: Path, tmp_path: Path
) -> None:
    """A store and the cache share their files, and so their damage."""
    source = text(work, tokenizer, "gab")
    store = prepare(source)
    list_of_documents = store / "shard-00001.documents.npy"
    assert list_of_documents.stat().st_nlink >= 2
    list_of_documents.write_bytes(damaged(list_of_documents.read_bytes()))
    assert prepare(source) == store
    assert is_as_from_scratch(store, source, tmp_path / "other")


def test_a_store_needs_nothing_but_itself(work: Path, tokenizer: Path) -> None:
    """As those of earlier versions, which kept nothing by file."""
    store = prepare(text(work, tokenizer, "abcdef"))
    whole = contents(store)
    for path in kept(work):
        path.unlink()
    assert prepare(text(work, tokenizer, "abcdef")) == store
    assert not kept(work)
    assert contents(store) == whole
    (store / "index.json").unlink()  # as after a kill
    assert prepare(text(work, tokenizer, "abcdef")) == store
    assert contents(store) == whole


def test_a_trained_tokenizer_is_of_its_corpus(work: Path, tokenizer: Path) -> None:
    source = text(work, tokenizer, "ab")
    source.config.tokenizer, source.config.tokenizer_vocab_size = None, 280
    seen = kept(work)
    assert TokenStore(prepare(source)).index.documents == 80
    assert kept(work) == seen


def test_without_a_cache_a_store_is_made_all_the_same(
    work: Path, tokenizer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = text(work, tokenizer, "ab")
    source.config.cache = str(work / "a.jsonl")
    tokenize(source, work / "out")
    assert "the cache cannot be used" in caplog.text
    assert is_as_from_scratch(work / "out", source, work / "other")


def test_where_there_are_no_links_there_are_copies(tmp_path: Path) -> None:
    source = Path("/proc/version")  # of another file system, always
    file_shards._link_or_copy(source, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == source.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_what_was_passed_over_is_told_of_kept_shards_too(
    work: Path, tokenizer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (work / "a.jsonl").write_text(documents("a") + '{"body": 1}\nnothing\n')
    for names in ("ab", "ba"):
        caplog.clear()
        prepare(text(work, tokenizer, names, on_bad_record=OnBadRecord.skip))
        assert "1 x bad record passed over: not JSON; the first is line 42 of" in caplog.text


def start(work: Path, tokenizer: Path, names: str) -> subprocess.Popen[str]:
    files = [str(work / f"{name}.jsonl") for name in names]
    return subprocess.Popen(
        [sys.executable, "-c", ONE, str(tokenizer), str(work / "cache"), *files],
        env={**os.environ, "PYTHONPATH": str(REPO / "src")},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_kill_costs_the_file_that_was_in_work(tmp_path: Path, tokenizer: Path) -> None:
    for n, name in enumerate("abcde"):
        (tmp_path / f"{name}.jsonl").write_text(documents(name, 1000 * (n + 1)))
    with start(tmp_path, tokenizer, "abcde") as process:
        deadline = time.monotonic() + 60
        while len(records(tmp_path)) < 2:
            assert process.poll() is None, "it has ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    time.sleep(0.2)  # until the kernel has killed the process that tokenises
    done, seen = records(tmp_path), kept(tmp_path)
    assert 2 <= len(done) < 5
    source = text(tmp_path, tokenizer, "abcde")
    store = prepare(source)
    again = kept(tmp_path)
    assert len(records(tmp_path)) == 5
    assert all(again[path] == seen[path] for record in done for path in record.parent.glob("shard-*"))
    assert is_as_from_scratch(store, source, tmp_path / "other")
    assert not [*tmp_path.rglob("*.tmp")]


@pytest.mark.slow
def test_processes_share_what_all_of_them_need(tmp_path: Path, tokenizer: Path) -> None:
    for name in "abcd":
        (tmp_path / f"{name}.jsonl").write_text(documents(name, 500))
    corpora = ("abc", "dcb", "bcd")
    with ExitStack() as held:
        processes = [held.enter_context(start(tmp_path, tokenizer, names)) for names in corpora]
        stores = [Path(process.communicate(timeout=60)[0].strip()) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(records(tmp_path)) == 4
    inodes = [{path.stat().st_ino for path in store.glob("shard-*")} for store in stores]
    assert inodes[1] == inodes[2]
    assert len(inodes[0] & inodes[1]) == 2 * 2
    for store, names in zip(stores, corpora, strict=True):
        assert is_as_from_scratch(store, text(tmp_path, tokenizer, names), tmp_path / f"other-{names}")


def encoding_of(tokenizer: Path) -> Encoding:
    file = tokenizer / "tokenizer.json"
    loaded = load_tokenizer(file)
    hashed = tokenizer_hash(file.read_bytes())
    return Encoding(
        tokenizer_hash=hashed,
        marks=DocumentMarks(end_of_text_id(loaded, file, None)),
        vocab_size=vocabulary_size(loaded),
    )


def test_what_changes_while_it_is_read_is_not_kept(work: Path, tokenizer: Path) -> None:
    source, encoding, seen = text(work, tokenizer, "ag"), encoding_of(tokenizer), kept(work)
    for change in (documents("other"), documents("g", 41)):
        places = file_shards.shard_places(source, source.units(), work / "store", encoding.identity())
        assert (places[0].folder / "shard-00000.json") in seen
        (work / "g.jsonl").write_text(change)
        with pytest.raises(DataError, match="must not change while they are tokenised, but did"):
            make_shard(TextSource, source.config, places[1], encoding, tokenizer / "tokenizer.json")
        assert kept(work) == seen


def test_what_has_no_name_for_its_content_is_tokenised_into_the_store(work: Path, tokenizer: Path) -> None:
    system, root = fsspec.core.url_to_fs(f"memory://{work}")
    system.pipe_file(f"{root}/x.jsonl", documents("x").encode())
    source, encoding = text(work, tokenizer, "ab"), encoding_of(tokenizer)
    source.config.files = [source.config.files[0], f"memory://{work}/x.jsonl", source.config.files[1]]
    places = file_shards.shard_places(source, source.units(), work, encoding.identity())
    assert [(p.content is None, p.folder == work, p.number) for p in places] == [
        (False, False, 0),
        (True, True, 1),
        (False, False, 0),
    ]
    for n, place in enumerate(places):
        make_shard(TextSource, source.config, place, encoding, tokenizer / "tokenizer.json")
        if place.content is not None:
            file_shards.put_into_store(place, work, n)
    made = {path.name: path.read_bytes() for path in work.glob("shard-*")}
    assert made.items() <= reference(source, work / "other").items()
    assert len(made) == 2 * 3
    system.rm(root, recursive=True)


@pytest.mark.slow
def test_objects_are_kept_by_what_their_place_calls_their_content(
    work: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_server() as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        for name, value in (("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "s"), ("REGION", "us-east-1")):
            monkeypatch.setenv(f"AWS_{name}", value)
        objects = obstore.store.S3Store("bucket", client_options={"allow_http": True})
        seen = kept(work)
        source = text(work, tokenizer, "")
        source.config.files = ["s3://bucket/*.jsonl"]
        for n, (name, body, new) in enumerate([("x", "1", 1), ("y", "2", 1), ("a", "1", 0), ("x", "3", 1)]):
            obstore.put(objects, f"{name}.jsonl", documents(body).encode())
            store = prepare(source)
            found = kept(work)
            assert seen.items() <= found.items()
            assert len(found) == len(seen) + 3 * new
            assert is_as_from_scratch(store, source, tmp_path / f"other-{n}")
            seen = found


def test_everything_that_decides_a_files_tokens_decides_its_name() -> None:
    base: dict[str, Any] = {
        "options": {"data.field": "text"},
        "content": "0" * 32,
        "ending": ".jsonl",
        "parts": [CorpusPart("a", 0, 5), CorpusPart("a", 5, 10)],
        "encoding": {"tokenizer": "ab", "end": "0", "dtype": "<u2"},
    }
    others: list[dict[str, Any]] = [
        {"options": {"data.field": "body"}},
        {"content": "1" * 32},
        {"ending": ".txt"},
        {"parts": [CorpusPart("a", 0, 10)]},
        *({"encoding": {**base["encoding"], name: "x"}} for name in base["encoding"]),
    ]
    names = [file_key(**{**base, **other}) for other in [{}, *others]]
    assert len(set(names)) == len(names)
    moved = [CorpusPart("b", part.start, part.stop) for part in base["parts"]]
    assert file_key(**{**base, "parts": moved}) == names[0]


def test_stores_of_earlier_versions_keep_their_names(work: Path, tokenizer: Path) -> None:
    """A corpus' content is the hash of its files' hashes, however they are remembered."""
    xxh3 = xxhash.xxh3_128
    bodies = [(work / f"{name}.jsonl").read_bytes() for name in "abc"]
    content = xxh3(b"".join(xxh3(body).digest() for body in bodies)).hexdigest()
    source = text(work, tokenizer, "abc")
    files = find_files(source.config.files)
    for _ in range(2):
        assert files_content(files, source.config) == content
        assert files_content(files[:1], source.config) == xxh3(xxh3(bodies[0]).digest()).hexdigest()
    assert source.key()["the text"] == digest("text", content, ".jsonl", ".jsonl", ".jsonl")


def test_many_short_documents_take_little_memory(tmp_path: Path) -> None:
    ids = np.array([1, 0])

    def many() -> Iterator[Encoded]:
        return (Encoded(ids, n) for n in range(50_000))

    tracemalloc.start()
    assert write_shard(tmp_path, 0, many(), np.dtype("<u2")) == 100_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 * 50_000


@given(st.lists(st.tuples(st.integers(1, 10**6), st.integers(0, 10**6)), min_size=1), st.data())
@settings(max_examples=50)
def test_progress_grows_to_the_whole(parts: list[tuple[int, int]], data: st.DataObject) -> None:
    total = sum(size for size, _ in parts)
    amount, tokens = Amount(total), 0
    for size, count in parts:
        tokens += count
        assert 0 <= amount.done_bytes(tokens + data.draw(st.integers(0, 10**7))) <= total
        amount.finish(size, count)
    assert amount.done_bytes(tokens) == total


def test_a_line_tells_of_progress_where_there_is_no_terminal(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), showing_progress(4 * 10**6, 2) as progress:
        progress.finish(2 * 10**6, 500_000)
        progress.show(500_000)
        assert not caplog.records
        progress._bar._said -= 11.0
        progress.show(750_000)
        progress.show(750_000)
    assert len(caplog.records) == 1
    assert caplog.messages[0].startswith("tokenising: 3 of 4 MB, ")
