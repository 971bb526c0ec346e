"""Corpora behind URLs: found by name and glob, read by ranges, known by what their place calls their content."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import obstore
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from obstore.store import MemoryStore

from regrow.trainer.data.config import TextConfig
from regrow.trainer.data.corpus_paths import find_files
from regrow.trainer.data.object_store_files import ObjectStorePlace
from regrow.trainer.data.remote_files import RemoteFile, RemotePlace
from regrow.trainer.data.source import DataError
from regrow.trainer.data.text import TextSource
from tests.s3_server import BreakingProxy, s3_server

TEXTS = [f"document {i} 🙂" for i in range(50)]
BODY = "".join(json.dumps({"text": t}) + "\n" for t in TEXTS).encode()


def corpus() -> dict[str, bytes]:
    table = pa.table({"text": TEXTS})
    parquet, arrow = pa.BufferOutputStream(), pa.BufferOutputStream()
    pq.write_table(table, parquet, row_group_size=20)
    with pa.ipc.new_stream(arrow, table.schema) as out:
        out.write_table(table)
    stream = arrow.getvalue().to_pybytes()
    return {
        "a.jsonl": BODY,
        "b/c.jsonl.gz": gzip.compress(BODY),
        "b/d.jsonl.zst": zstandard.compress(BODY),
        "b/e.parquet": parquet.getvalue().to_pybytes(),
        "saved/data-0.arrow": stream,
        "saved/state.json": b'{"_data_files": [{"filename": "data-0.arrow"}]}',
        "f.txt": "żółw\n".encode() * 20,
        ".hidden.jsonl": b"no record",
        "g[1].jsonl": BODY,
    }


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[str]:
    url = f"memory://{tmp_path}"
    system, root = fsspec.core.url_to_fs(url)
    for name, body in corpus().items():
        system.pipe_file(f"{root}/{name}", body)
    yield url
    system.rm(root, recursive=True)


def read(*files: str, **options: Any) -> list[str]:
    source = TextSource(TextConfig(files=list(files), txt_document_bytes=0, **options))
    source.check()
    return [t for u in source.units() for t in source.read(u)]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.jsonl", ["a.jsonl"]),
        ("*.jsonl", ["a.jsonl", "g[1].jsonl"]),
        ("g[1].jsonl", ["g[1].jsonl"]),
        ("b/*.jsonl.*", ["b/c.jsonl.gz", "b/d.jsonl.zst"]),
        ("b/[ce].*", ["b/c.jsonl.gz", "b/e.parquet"]),
        ("*/*.parquet", ["b/e.parquet"]),
        ("**/*.jsonl*", ["a.jsonl", "b/c.jsonl.gz", "b/d.jsonl.zst", "g[1].jsonl"]),
        (".h*", [".hidden.jsonl"]),
        ("saved", ["saved/data-0.arrow"]),
    ],
)
def test_globs_over_a_listing_are_as_on_a_disk(memory: str, tmp_path: Path, pattern: str, names: list[str]) -> None:
    assert [f.name for f in find_files([f"{memory}/{pattern}"])] == [f"{memory}/{n}" for n in names]
    for name, body in corpus().items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(body)
    for local in (str(tmp_path / pattern), f"file://{tmp_path / pattern}"):
        assert [f.name for f in find_files([local])] == [str(tmp_path / n) for n in names]


def test_every_format_is_read_from_a_url(memory: str) -> None:
    names = [n for n in corpus() if n.startswith(("a", "b", "saved/d"))]
    assert read(*(f"{memory}/{n}" for n in names)) == TEXTS * len(names)
    assert read(f"{memory}/f.txt") == ["żółw\n" * 20]
    files = [f"{memory}/**/*.jsonl.gz", f"{memory}/b/e.parquet"]
    assert read(*files, where={"text": TEXTS[7]}) == [TEXTS[7]] * 2


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none.jsonl", "must name files that exist, but {url}/none.jsonl matches none"),
        ("none-*", "must name files that exist, but {url}/none-* matches none"),
        ("b", "must name files, but {url}/b is a folder; use for instance {url}/b/*.jsonl"),
        ("saved/state.json", "data.files must end in one of"),
        ("cut.jsonl.gz", "data.files must be whole, but {url}/cut.jsonl.gz is cut short after line"),
        ("bad.jsonl", "line 51 of {url}/bad.jsonl is none"),
        ("cut.parquet", "{url}/cut.parquet is no whole Parquet file"),
    ],
)
def test_what_cannot_be_read_is_one_sentence_with_the_url(memory: str, name: str, words: str) -> None:
    system, root = fsspec.core.url_to_fs(memory)
    system.pipe_file(f"{root}/cut.jsonl.gz", gzip.compress(BODY)[:-9])
    system.pipe_file(f"{root}/bad.jsonl", BODY + b"bad\n")
    system.pipe_file(f"{root}/cut.parquet", corpus()["b/e.parquet"][:-9])
    with pytest.raises((DataError, FileNotFoundError)) as caught:
        read(f"{memory}/{name}")
    assert words.format(url=memory) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "words"),
    [("nothing://a/b.txt", "URLs that obstore or fsspec open"), ("adl://a/b.txt", "whose library is installed")],
)
def test_a_url_that_nothing_opens_is_refused(url: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        find_files([url])


def test_the_key_changes_with_the_content_behind_a_url(memory: str, tmp_path: Path) -> None:
    def key(*files: str) -> str:
        return TextSource(TextConfig(files=list(files), cache=str(tmp_path / "c"))).key()["the text"]

    url = f"{memory}/a.jsonl"
    before = key(url)
    system, path = fsspec.core.url_to_fs(url)
    system.pipe_file(path, BODY)  # again
    assert key(url) == before
    assert key(f"{memory}/g[[]1].jsonl") == before  # the same bytes at another place
    (tmp_path / "l.jsonl").write_bytes(BODY)
    both = {key(url, str(tmp_path / "l.jsonl")), key(str(tmp_path / "l.jsonl"), url), key(str(tmp_path / "l.jsonl"))}
    system.pipe_file(path, BODY.replace(b"7", b"8"))
    assert len({before, key(url), *both, key(url, str(tmp_path / "l.jsonl"))}) == 6


class Counting(RemotePlace):
    """Tells what it is asked for."""

    def __init__(self, place: RemotePlace) -> None:
        self.place = place
        self.asked: list[int] = []

    def find(self, url: str) -> Any:
        return self.place.find(url)

    def below(self, url: str) -> Any:
        return self.place.below(url)

    def read_range(self, url: str, offset: int, length: int) -> bytes:
        self.asked.append(length)
        return self.place.read_range(url, offset, length)


def test_objects_are_read_by_ranges_and_never_whole() -> None:
    store = MemoryStore()
    body = b"".join(i.to_bytes(4, "little") for i in range(3 << 20))
    obstore.put(store, "folder/a b#%41.jsonl", body)
    place = Counting(ObjectStorePlace("s3://bucket", store))
    (found,) = place.below("s3://bucket/folder")
    assert (found.url, found.size) == ("s3://bucket/folder/a b#%41.jsonl", len(body))
    assert found == place.find(found.url)
    assert found.tag
    with RemoteFile(place, found).open() as file:
        assert place.asked == []
        assert file.read(100) == body[:100]
        file.seek(-5, 2)
        assert file.read() == body[-5:]
        file.seek(0)
        assert b"".join(iter(lambda: file.read(12345), b"")) == body
    assert max(place.asked) <= 4 << 20
    obstore.put(store, "folder/a b#%41.jsonl", body[:-1] + b"x")
    assert place.find(found.url).tag != found.tag
    with pytest.raises(FileNotFoundError):
        place.find("s3://bucket/folder")
    obstore.put(store, "folder/a b#%41.jsonl", b"short")
    with RemoteFile(place, found).open() as file, pytest.raises(OSError):  # noqa: PT012
        file.read(100)
        file.read(100)


@pytest.mark.slow
def test_a_real_s3_server_gives_the_corpus_and_its_etags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with s3_server() as port:
        proxy = BreakingProxy(port)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        for name, value in (("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "s"), ("REGION", "us-east-1")):
            monkeypatch.setenv(f"AWS_{name}", value)
        store = obstore.store.S3Store("bucket", client_options={"allow_http": True})
        for name, body in corpus().items():
            obstore.put(store, f"corpus/{name}", body)
        names = [n for n in corpus() if n.startswith(("a", "b", "saved/d"))]
        proxy.break_next("GET /bucket/corpus", 2)  # are tried again
        files = ["s3://bucket/corpus/a.jsonl", "s3://bucket/corpus/b/*", "s3://bucket/corpus/saved"]
        assert read(*files) == TEXTS * len(names)
        assert proxy.broken == 2
        source = TextSource(TextConfig(files=files, cache=str(tmp_path / "c")))
        before = source.key()
        asked = len(proxy.seen)
        assert source.key() == before
        assert not [
            r for r in proxy.seen[asked:] if r.startswith("GET") and "list-type" not in r and "state" not in r
        ]
        obstore.put(store, "corpus/b/c.jsonl.gz", gzip.compress(BODY, 1))
        assert source.key() != before
        with pytest.raises(FileNotFoundError, match="s3://bucket/corpus/x-.* matches none"):
            read("s3://bucket/corpus/x-*.jsonl")
        with pytest.raises(DataError, match="s3://nothing-here/x.*cannot") as caught:
            read("s3://nothing-here/x-*.jsonl")
        assert "\n" not in str(caught.value)
        proxy.close()
