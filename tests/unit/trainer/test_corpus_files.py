"""What corpora hold: every byte is read as it is meant, or a sentence says which is not."""

import bz2
import codecs
import gzip
import json
import lzma
import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings

from regrow.trainer.data.config import TextConfig
from regrow.trainer.data.source import CorpusPart, DataError
from regrow.trainer.data.text import TextSource

TEXTS = [f"document {i} with ünïcode 你好 🙂" for i in range(40)]
BODY = "".join(json.dumps({"text": t, "n": i}) + "\n" for i, t in enumerate(TEXTS)).encode()
PACK: dict[str, Callable[[bytes], bytes]] = {
    ".jsonl": lambda b: b,
    ".jsonl.gz": lambda b: gzip.compress(b, mtime=0),
    ".jsonl.zst": zstandard.compress,
    ".jsonl.bz2": bz2.compress,
    ".jsonl.xz": lzma.compress,
}
COMPRESSED = [end for end in PACK if end != ".jsonl"]


def source(*files: Path, **options: Any) -> TextSource:
    return TextSource(TextConfig(files=[str(f) for f in files], cache=str(files[0].parent / "cache"), **options))


def documents(text: TextSource) -> list[str]:
    text.check()
    return [d for u in text.units() for d in text.read(u)]


def written(path: Path, body: bytes) -> Path:
    path.write_bytes(body)
    return path


def refusal(text: TextSource) -> str:
    with pytest.raises(DataError) as caught:
        documents(text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("end", COMPRESSED)
def test_all_members_and_frames_of_a_compressed_file_are_read(tmp_path: Path, end: str) -> None:
    half = BODY.index(b"\n", len(BODY) // 2) - 5  # a line goes on in the next member
    skippable = struct.pack("<II", 0x184D2A50, 4) + b"abcd" if end.endswith("zst") else b""
    body = PACK[end](BODY[:half]) + skippable + PACK[end](BODY[half:])
    assert documents(source(written(tmp_path / f"a{end}", body))) == TEXTS


@pytest.mark.parametrize("end", COMPRESSED)
def test_a_compressed_file_cut_anywhere_is_refused(tmp_path: Path, end: str) -> None:
    rng = random.Random(0)
    body = PACK[end](b"".join(b'{"text": "%s"}\n' % rng.randbytes(40).hex().encode() for _ in range(200)))
    for stop in {0, 1, 5, len(body) - 1, *(rng.randrange(len(body)) for _ in range(30))}:
        sentence = refusal(source(written(tmp_path / f"a{end}", body[:stop])))
        assert "is cut short after line" in sentence
        assert f"a{end}" in sentence


@pytest.mark.parametrize("end", COMPRESSED)
def test_a_damaged_compressed_file_is_named(tmp_path: Path, end: str) -> None:
    body = bytearray(PACK[end](BODY))
    body[len(body) // 2] ^= 0xFF
    body[-3] ^= 0xFF
    assert f"a{end}" in refusal(source(written(tmp_path / f"a{end}", bytes(body))))
    assert "is damaged" in refusal(source(written(tmp_path / f"b{end}", PACK[end](BODY) + b"garbage at the end")))


@pytest.mark.parametrize("end", PACK)
@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "latin \xe9 one"}', "line 41 of .* is not (byte 17"),
        (b'{"text": "surrogate bytes \xed\xa0\x80"}', "line 41 of .* is not (byte"),
        (b'{"text": "not closed', "line 41 of .* is none (Invalid control character at character 20)"),
        (b"not json at all", "line 41 of .* is none (Expecting value.*begins with 'not json at all'"),
        (b'["a", "list"]', "line 41 of .* is a list"),
        (b"17", "line 41 of .* is a number"),
        (b'{"body": "x", "id": 3}', "data.field .* line 41 of .* has no 'text', only 'body', 'id'"),
        (b'{"text": 5}', "data.field .* 'text' in line 41 of .* is a number"),
        (b'{"text": ["a"]}', "data.field .* 'text' in line 41 of .* is a list"),
        (b'{"text": {"a": 1}}', "data.field .* 'text' in line 41 of .* is a JSON object"),
        (b'{"text": true}', "data.field .* 'text' in line 41 of .* is a true or false"),
        (b'{"text": ' + b"[" * 200_000, "line 41 of .* nested too deeply"),
        (b'{"text": "x", "n": ' + b"9" * 10_000 + b"}", "line 41 of .* Exceeds the limit"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_a_bad_record_is_named_with_file_and_line(tmp_path: Path, end: str, line: bytes, words: str) -> None:
    sentence = refusal(source(written(tmp_path / f"a{end}", PACK[end](BODY + line + b"\n" + BODY))))
    position = 0
    for part in words.split(".*"):
        found = sentence.find(part.strip(), position)
        assert found >= 0, (part, sentence)
        position = found
    assert f"a{end}" in sentence
    assert len(sentence) < 600


def test_a_line_is_counted_from_the_files_beginning_in_every_part(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", BODY + b"broken\n" + BODY)
    text = source(path)
    for start in (1, 500, len(BODY) - 1, len(BODY)):
        with pytest.raises(DataError, match="line 41 of"):
            list(text.read(CorpusPart(str(path), start, path.stat().st_size)))


def test_half_a_surrogate_pair_is_replaced_and_counted(tmp_path: Path) -> None:
    lines = [r'{"text": "a \ud83d b"}', r'{"text": "\ude42\ud83d"}', r'{"text": "whole \ud83d\ude42"}']
    text = source(written(tmp_path / "a.jsonl", "\n".join(lines).encode()))
    assert documents(text) == ["a \ufffd b", "\ufffd\ufffd", "whole 🙂"]
    ((what, (count, where)),) = text.notes.counts.items()
    assert "surrogate" in what
    assert (count, where) == (2, f"line 1 of {tmp_path / 'a.jsonl'}")


def test_null_and_empty_texts_and_blank_lines_are_passed_over(tmp_path: Path) -> None:
    body = b'\n{"text": null}\n  \n{"text": ""}\r\n{"text": "x"}\n{"text": null}'
    text = source(written(tmp_path / "a.jsonl", body))
    assert documents(text) == ["x"]
    assert text.notes.counts == {
        "null instead of text, passed over": (2, f"line 2 of {tmp_path / 'a.jsonl'}"),
    }


@pytest.mark.parametrize("end", [*PACK, ".txt"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, end: str) -> None:
    body = codecs.BOM_UTF8 + (b"text" if end == ".txt" else b'{"text": "text"}\n{"text": "two"}')
    found = documents(source(written(tmp_path / f"a{end}", PACK.get(end, bytes)(body))))
    assert found == (["text"] if end == ".txt" else ["text", "two"])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("end", [*PACK, ".txt"])
def test_utf16_and_utf32_are_refused(tmp_path: Path, end: str, encoding: str) -> None:
    body = '{"text": "words and words"}\n'.encode(encoding)
    sentence = refusal(source(written(tmp_path / f"a{end}", PACK.get(end, bytes)(body))))
    assert "must be UTF-8, but" in sentence
    assert "iconv" in sentence


@pytest.mark.parametrize("size", [0, 1, 100])
def test_a_text_file_that_is_not_utf8_is_refused_with_line_and_byte(tmp_path: Path, size: int) -> None:
    good = "żółw\n\n" * 5000
    path = written(tmp_path / "a.txt", good.encode() + b"caf\xe9\n" + good.encode())
    sentence = refusal(source(path, txt_document_bytes=size))
    assert f"line 10001 of {path} is not, at byte {len(good.encode()) + 3}" in sentence


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=8), end=st.sampled_from([*PACK]))
def test_any_text_comes_back(tmp_path_factory: pytest.TempPathFactory, texts: list[str], end: str) -> None:
    body = "".join(json.dumps({"text": t}, ensure_ascii=len(t) % 2 == 0) + "\n" for t in texts).encode()
    path = written(tmp_path_factory.mktemp("any") / f"a{end}", PACK[end](body))
    assert documents(source(path)) == [t for t in texts if t]


ARROW: dict[str, Callable[[list[Any]], Any]] = {
    "string": lambda t: pa.array(t, pa.string()),
    "large_string": lambda t: pa.array(t, pa.large_string()),
    "string_view": lambda t: pa.array(t, pa.string_view()),
    "binary": lambda t: pa.array([None if x is None else x.encode() for x in t], pa.binary()),
    "large_binary": lambda t: pa.array([None if x is None else x.encode() for x in t], pa.large_binary()),
    "dictionary": lambda t: pa.array(t).dictionary_encode(),
}


@pytest.mark.parametrize("kind", ARROW)
def test_every_parquet_column_of_text_is_read_as_text(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"n": range(43), "text": ARROW[kind]([*TEXTS, None, "", TEXTS[0]])}), path, row_group_size=9
    )
    text = source(path)
    assert documents(text) == [*TEXTS, TEXTS[0]]
    assert text.notes.counts == {"null instead of text, passed over": (1, f"row 41 of {path}")}


@pytest.mark.parametrize(
    ("column", "name"),
    [
        (pa.array([["a"], ["b"]]), "list<"),
        (pa.array([{"a": "b"}, {"a": "c"}]), "struct<"),
        (pa.array([1, 2]), "int64"),
        (pa.array([True, False]), "bool"),
        (pa.array([1, 2]).dictionary_encode(), "int64"),
        (pa.array([b"ab"], pa.binary(2)), "fixed_size_binary"),
        (pa.array([1], pa.timestamp("s")), "timestamp"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_parquet_column_that_is_not_text_is_refused_by_name_and_type(
    tmp_path: Path, column: Any, name: str
) -> None:
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    sentence = refusal(source(tmp_path / "a.parquet"))
    assert f"'text' in {tmp_path / 'a.parquet'} is of type {name}" in sentence


def test_parquet_bytes_that_are_not_utf8_are_refused_with_the_row(tmp_path: Path) -> None:
    rows = [b"fine"] * 70 + [b"caf\xe9"]
    pq.write_table(pa.table({"text": pa.array(rows, pa.binary())}), tmp_path / "a.parquet", row_group_size=50)
    assert f"'text' in row 71 of {tmp_path / 'a.parquet'} is not (byte 4" in refusal(source(tmp_path / "a.parquet"))


def test_a_missing_parquet_column_is_named_before_anything_is_read(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["x"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"data.field must be a column of .* \(body, id\), but 'text' is none"):
        source(tmp_path / "a.parquet").units()
    assert "is no whole Parquet file" in refusal(source(written(tmp_path / "b.parquet", b"")))


def test_names_with_brackets_are_names_before_they_are_globs(tmp_path: Path) -> None:
    for name in ("a[1].txt", "a1.txt", "a2.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "run[1]").mkdir()
    (tmp_path / "run[1]/b[x].txt").write_text("b")
    (tmp_path / "run[1]/bx.txt").write_text("bx")

    def names(pattern: str) -> list[str]:
        return documents(TextSource(TextConfig(files=[str(tmp_path / pattern)])))

    assert names("a[1].txt") == ["a[1].txt"]
    assert names("a[2].txt") == ["a2.txt"]
    assert names("a[0-9].txt") == ["a1.txt", "a2.txt"]
    assert names("run[1]/*.txt") == ["b", "bx"]
    assert names("run*/b[x].txt") == ["b"]
    assert names("run[1]/**/*.txt") == ["b", "bx"]
    assert names("**/a?.txt") == ["a1.txt", "a2.txt"]


def test_a_folder_a_pipe_and_a_dangling_link_are_no_corpus_files(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert f"but {tmp_path / 'folder'} is a folder; use for instance" in refusal(source(tmp_path / "folder"))
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "pipe.jsonl cannot (Not a regular file)" in refusal(source(tmp_path / "pipe.jsonl"))
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    assert "zero.txt cannot (Not a regular file)" in refusal(source(tmp_path / "zero.txt"))
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    assert "gone.txt cannot (No such file" in refusal(source(tmp_path / "gone.txt"))
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    assert "loop.txt cannot (Too many levels" in refusal(source(tmp_path / "loop.txt"))


_BOMB = """
import resource, sys
from regrow.trainer.data.config import TextConfig
from regrow.trainer.data.text import TextSource
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
field = "meta.text" if "nested" in sys.argv[1] else "text"
text = TextSource(TextConfig(files=sys.argv[1:], field=field, cache=sys.argv[1] + ".cache"))
try:
    n = sum(len(d) for u in text.units() for d in text.read(u))
except ValueError as error:
    n = str(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, n)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*COMPRESSED, ".parquet", "nested.parquet"])
def test_a_small_file_does_not_fill_the_memory(tmp_path: Path, kind: str) -> None:
    """600 MiB in one line, or as one long text that many rows name."""
    path = tmp_path / f"a{kind}"
    if kind == ".parquet":
        texts = pa.DictionaryArray.from_arrays(pa.array([0] * 100, pa.int32()), ["x" * (6 << 20)])
        pq.write_table(pa.table({"text": texts}), path, compression="zstd")
    elif kind == "nested.parquet":
        once = pa.table({"meta": [{"text": "x" * (6 << 20)}] * 2})
        with pq.ParquetWriter(path, once.schema, compression="zstd") as out:
            for _ in range(50):
                out.write_batch(once.to_batches()[0])
    else:
        block = PACK[kind](b" " * (20 << 20))
        path.write_bytes(PACK[kind](b'{"text": "x",') + block * 30 + PACK[kind](b'"a": 1}\n'))
    assert path.stat().st_size < 1 << 20
    done = subprocess.run([sys.executable, "-c", _BOMB, str(path)], capture_output=True, text=True, check=True)
    grown, _, result = done.stdout.partition(" ")
    assert int(grown) < 256 << 10
    assert result.strip() == str(600 << 20) if "parquet" in kind else "is longer; cut its text" in result
