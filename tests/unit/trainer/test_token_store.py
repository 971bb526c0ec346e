"""Token stores: named by everything that decides their bytes, and believed only where all parts fit."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from regrow.launch.commands import data as data_command
from regrow.trainer.data.config import TextConfig, TokensConfig
from regrow.trainer.data.prepare import prepare, store_folder
from regrow.trainer.data.source import DataError
from regrow.trainer.data.text import TextSource
from regrow.trainer.data.token_store import StoreDamagedError, TokensSource, TokenStore
from regrow.trainer.data.tokenizer import train_bpe
from regrow.trainer.data.windows import ConcatWindows

TEXTS = [" ".join(["alpha beta gamma delta"] * (n % 7 + 1)) + str(n) for n in range(30)]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, and the folder of a tokenizer."""
    folder = tmp_path_factory.mktemp("given")
    (folder / "tokenizer").mkdir()
    train_bpe(TEXTS, 280, folder / "tokenizer/tokenizer.json")
    (folder / "c.jsonl").write_text("".join(json.dumps({"text": t, "body": t[::-1]}) + "\n" for t in TEXTS))
    return folder


@pytest.fixture
def work(given: Path, tmp_path: Path) -> Path:
    """A copy that may change."""
    shutil.copytree(given, tmp_path / "w", ignore=shutil.ignore_patterns("cache"))
    return tmp_path / "w"


def text(work: Path, **options: Any) -> TextSource:
    defaults = {"files": [str(work / "c.jsonl")], "tokenizer": str(work / "tokenizer"), "cache": str(work / "cache")}
    return TextSource(TextConfig(**{**defaults, "workers": 1, **options}))


@pytest.fixture(scope="module")
def stored(given: Path) -> Path:
    """A finished store."""
    return prepare(text(given))


def all_ids(store: TokenStore) -> list[int]:
    windows = ConcatWindows(store, 1, 0.0, validation=False)
    token, label = np.zeros((2, 1), dtype=np.int64)
    ids = []
    for n in range(len(windows)):
        windows.read(n, token, label, None)
        ids.append(int(token[0]))
    return [*ids, int(label[0])]


def changed_tokenizer(work: Path) -> None:
    train_bpe([*TEXTS, "omega"], 281, work / "tokenizer/tokenizer.json")


def same_size_and_time(work: Path) -> None:
    """Another text of the same length, with the times of the file that it replaces."""
    before = (work / "c.jsonl").stat()
    (work / "c.jsonl").write_bytes((work / "c.jsonl").read_bytes().replace(b"alpha", b"omega"))
    os.utime(work / "c.jsonl", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (work / "c.jsonl").stat().st_mtime_ns == before.st_mtime_ns


OTHER: dict[str, tuple[Any, dict[str, Any], str]] = {
    "tokenizer": (changed_tokenizer, {}, "data.tokenizer"),
    "its own end of text": (
        lambda w: (w / "tokenizer/tokenizer_config.json").write_text('{"eos_token": "%"}'),
        {},
        "data.eos_token",
    ),
    "the end of text": (lambda w: None, {"eos_token": "a"}, "data.eos_token"),
    "a trained tokenizer": (lambda w: None, {"tokenizer": None, "tokenizer_vocab_size": 262}, "data.tokenizer"),
    "the field": (lambda w: None, {"field": "body"}, "data.field"),
    "the documents' size": (lambda w: None, {"txt_document_bytes": 1}, "data.txt_document_bytes"),
    "the text": (same_size_and_time, {}, "the text"),
    "more text": (
        lambda w: (w / "d.jsonl").write_text('{"text": "x"}'),
        {"files": ["c.jsonl", "d.jsonl"]},
        "the text",
    ),
}


@pytest.fixture(scope="module")
def out(stored: Path, given: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `regrow-data tokenize` made of the same corpus."""
    folder = tmp_path_factory.mktemp("made") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(given)
        assert run(["tokenize", str(folder), "c.jsonl", "--workers", "1", "--tokenizer", "tokenizer"], patch) == 0
    left = {".lock"}
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {p.name: p.read_bytes() for p in stored.iterdir()}
    assert left < {p.name for p in folder.iterdir()}
    return folder


@pytest.mark.parametrize("case", OTHER)
def test_whatever_decides_the_bytes_decides_the_folder(
    work: Path, out: Path, case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(work)
    shutil.copytree(out, work / "out")
    config = text(work).config
    kept: dict[str, Any] = {"files": ["c.jsonl"], "workers": 1, "cache": config.cache, "tokenizer": config.tokenizer}
    before = store_folder(text(work))
    assert store_folder(TextSource(TextConfig(**kept))) == before
    assert run(other_command({}), monkeypatch) == 0
    change, options, name = OTHER[case]
    change(work)
    assert store_folder(TextSource(TextConfig(**{**kept, **options}))) != before
    assert run(other_command(options), monkeypatch) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: out must be empty or made with the same options, but ")
    assert f"{name} was " in error


def other_command(options: dict[str, Any]) -> list[str]:
    files = options.get("files", ["c.jsonl"])
    flags = {"field": "--field", "eos_token": "--eos-token", "txt_document_bytes": "--txt-document-bytes"}
    flags["tokenizer_vocab_size"] = "--vocab-size"
    more = [part for k, flag in flags.items() if k in options for part in (flag, str(options[k]))]
    tokenizer = [] if "tokenizer" in options else ["--tokenizer", "tokenizer"]
    return ["tokenize", "out", *files, "--workers", "1", *tokenizer, *more]


def run(command: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """`regrow-data` in this process."""
    monkeypatch.setattr("sys.argv", ["regrow-data", *command])
    try:
        data_command.main()
    except SystemExit as error:
        assert isinstance(error.code, int)
        return error.code
    return 0


def test_a_corpus_that_moved_is_the_same_corpus(work: Path) -> None:
    a = store_folder(text(work))
    (work / "c.jsonl").rename(work / "moved.jsonl")
    os.utime(work / "moved.jsonl", (1, 1))
    assert store_folder(text(work, files=[str(work / "moved.jsonl")])) == a


def test_another_end_of_text_ends_the_documents(work: Path) -> None:
    """Two releases of one family: the same tokenizer.json, another end of text."""
    ends = []
    for eos in ("<|endoftext|>", "%"):
        (work / "tokenizer/tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": eos}}))
        store = TokenStore(prepare(text(work)))
        ends.append(all_ids(store)[-1])
        assert store.index.end_of_text == ends[-1]
    vocab = json.loads((work / "tokenizer/tokenizer.json").read_text())["model"]["vocab"]
    assert ends == [vocab["<|endoftext|>"], vocab["%"]]


def test_a_vocabulary_is_asked_about_before_anything_is_tokenised(work: Path) -> None:
    def refuse(size: int) -> None:
        raise ValueError(f"too many: {size}")

    with pytest.raises(ValueError, match="too many: 2"):
        prepare(text(work), refuse)
    assert not list((work / "cache").rglob("shard-*"))


def test_a_damaged_cached_store_is_made_again(work: Path, stored: Path) -> None:
    folder = store_folder(text(work))
    shutil.copytree(stored, folder)
    whole = {p.name: p.read_bytes() for p in folder.iterdir()}
    for names in (["index.json"], ["tokenizer.json", "shard-00000.tokens", "shard-00000.documents.npy"]):
        for name in names:
            (folder / name).write_bytes(whole[name][:-3])
        assert prepare(text(work)) == folder
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == whole


def test_a_corpus_that_changes_while_it_is_read_is_refused(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = text(work)
    units = source.units

    def growing() -> Any:
        found = units()
        with (work / "c.jsonl").open("a") as out:
            out.write('{"text": "late"}\n')
        return found

    monkeypatch.setattr(source, "units", growing)
    with pytest.raises(DataError, match="must not change while they are tokenised"):
        prepare(source)
    assert not [*(work / "cache").rglob("index.json"), *(work / "cache").rglob("shard-*")]


def test_a_cache_that_cannot_be_written_is_named(work: Path) -> None:
    (work / "file").touch()
    with pytest.raises(
        DataError, match=r"data.cache must be a folder that can be written, but .*file.* cannot \(Not a"
    ):
        prepare(text(work, cache=str(work / "file")))


INDEX_CHANGES: dict[str, Any] = {
    "format": [0, 4, "1", None, 1e9],
    "dtype": ["<u8", "O", "<f4", "object", "|V1000000", 5],
    "shards": [-1, 0, 10**6, 10**9, 2**70, "1", 2, None],
    "tokens": [-1, 0, 2**62, 2**64, 1.5],
    "documents": [0, 31, -5, "x"],
    "vocab_size": [-1, 2**32 + 1, 70_000, None],
    "tokenizer_hash": ["", "../x", "00", "\ud800", 5],
    "fingerprint": ["0" * 32, "", None, "x" * 100],
    "end_of_text": [-1, 2**32, "a"],
}


@pytest.mark.parametrize("field", INDEX_CHANGES)
def test_a_forged_index_is_refused(stored: Path, tmp_path: Path, field: str) -> None:
    shutil.copytree(stored, tmp_path / "s")
    sound = json.loads((stored / "index.json").read_text())
    for value in INDEX_CHANGES[field]:
        (tmp_path / "s/index.json").write_text(json.dumps({**sound, field: value}))
        with pytest.raises(DataError) as caught:
            TokensSource(TokensConfig(path=str(tmp_path / "s"))).check()
        assert str(tmp_path / "s") in str(caught.value)
        assert str(caught.value).isprintable()
    (tmp_path / "s/index.json").write_text(json.dumps({**sound, "later": {"field": 1}}))
    assert TokenStore(tmp_path / "s").index.documents == len(TEXTS)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': [('tokens', '<u4'), ('hash', '<u8')], 'fortran_order': False, 'shape': (1099511627776,), }",
        "{'descr': [('tokens', '<u4'), ('hash', '<u8')], 'fortran_order': False, 'shape': (-1,), }",
        "{'descr': [('tokens', '<u4'), ('hash', '<u8')], 'fortran_order': False, 'shape': (30, 1), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (30,), }",
        "{'descr': '|V12', 'fortran_order': False, 'shape': (30,), }",
        "__import__('os').system('touch hacked')",
        "{'descr': " + "(" * 3000 + "}",
    ],
    ids=lambda h: h[:60],
)
def test_a_forged_list_of_documents_is_refused(stored: Path, tmp_path: Path, header: str) -> None:
    shutil.copytree(stored, tmp_path / "s")
    path = tmp_path / "s/shard-00000.documents.npy"
    rows = path.read_bytes()[-30 * 12 :]
    body = header.encode() + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body + rows)
    with pytest.raises(StoreDamagedError, match="is no list of documents.*remove the folder and tokenize again"):
        TokenStore(tmp_path / "s")


def test_special_files_are_no_part_of_a_store(stored: Path, tmp_path: Path) -> None:
    for name in ("index.json", "tokenizer.json", "shard-00000.tokens", "shard-00000.documents.npy"):
        folder = tmp_path / name.replace(".", "-")
        shutil.copytree(stored, folder)
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(DataError, match="Not a regular file"):
            TokenStore(folder)


def test_an_id_beyond_the_vocabulary_is_not_trained_on(stored: Path, tmp_path: Path) -> None:
    shutil.copytree(stored, tmp_path / "s")
    ids = np.fromfile(tmp_path / "s/shard-00000.tokens", "<u2")
    ids[100] = 60_000
    ids.tofile(tmp_path / "s/shard-00000.tokens")
    with pytest.raises(StoreDamagedError, match=r"shard-00000.tokens must hold ids below 2\d\d, but holds 60000"):
        all_ids(TokenStore(tmp_path / "s"))


def as_format_1(folder: Path, **changes: Any) -> None:
    """The index as the first version wrote it."""
    index = json.loads((folder / "index.json").read_text())
    index.pop("end_of_text", None)
    (folder / "index.json").write_text(json.dumps({**index, "format": 1, **changes}))


def test_a_store_of_format_1_is_read(stored: Path, tmp_path: Path) -> None:
    shutil.copytree(stored, tmp_path / "s")
    as_format_1(tmp_path / "s")
    now, then = TokenStore(stored), TokenStore(tmp_path / "s")
    assert then.index.fingerprint == now.index.fingerprint
    assert then.index.vocab_size == now.index.vocab_size
    assert then.index.end_of_text is None
    assert all_ids(then) == all_ids(now)


def test_a_store_of_format_1_counts_its_largest_id(work: Path) -> None:
    """The first version wrote the number of tokens; where that made ids wrap, the store is refused."""
    tokenizer = json.loads((work / "tokenizer/tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["<|sep|>"] = 70_000
    (work / "tokenizer/tokenizer.json").write_text(json.dumps(tokenizer))
    folder = prepare(text(work))
    assert TokenStore(folder).index.vocab_size == 70_001
    as_format_1(folder, vocab_size=281)
    assert TokenStore(folder).index.vocab_size == 70_001
    as_format_1(folder, vocab_size=281, dtype="<u2")
    with pytest.raises(StoreDamagedError, match="written by a version that cut ids short"):
        TokenStore(folder)


def test_a_folder_of_an_earlier_version_is_left_alone(
    work: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(work)
    shutil.copytree(out, work / "out")
    (work / "out/corpus.json").rename(work / "out/corpus.txt")
    before = {p.name: p.read_bytes() for p in (work / "out").iterdir()}
    assert run(["tokenize", "out", "c.jsonl", "--vocab-size", "262", "--workers", "1"], monkeypatch) == 2
    assert "made by a version that did not note its options; choose another one" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in (work / "out").iterdir()} == before
