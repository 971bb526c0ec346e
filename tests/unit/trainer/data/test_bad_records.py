"""Malformed inputs: a sentence with file and place, or records that are counted and passed over; never silence."""

import bz2
import gzip
import io
import json
import logging
import lzma
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings

from regrow.trainer.data.config import OnBadRecord, TextConfig
from regrow.trainer.data.source import CorpusPart, DataError
from regrow.trainer.data.text import TextSource

GOOD = [f"good {i}" for i in range(8)]
LINES = "".join(json.dumps({"text": t}) + "\n" for t in GOOD).encode()
BIG = b'{"text": "' + b"x" * (9 << 20) + b'"}\n'


def parquet(column: Any, name: str = "text") -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({name: column}), out)
    return out.getvalue()


def arrow(column: Any, *, closed: bool = True) -> bytes:
    out = io.BytesIO()
    table = pa.table({"text": column})
    writer = pa.ipc.new_stream(out, table.schema)
    writer.write_table(table)
    body = out.getvalue()
    writer.close()
    return out.getvalue() if closed else body


def not_utf8(kind: Any) -> Any:
    return pa.array([b"good", b"caf\xe9", b"good"]).cast(pa.large_binary()).cast(pa.binary()).view(kind)


def with_dictionary_of_4_gib(body: bytes) -> bytes:
    """An .xz file whose block's header asks for that much, with a right checksum."""
    packed = bytearray(lzma.compress(body))
    end = 12 + (packed[12] + 1) * 4
    assert packed[14:16] == b"\x21\x01"  # LZMA2 and one byte for it
    packed[16] = 40
    packed[end - 4 : end] = zlib.crc32(packed[12 : end - 4]).to_bytes(4, "little")
    return bytes(packed)


def source(path: Path, **options: Any) -> TextSource:
    return TextSource(TextConfig(files=[str(path)], cache=str(path.parent / "cache"), **options))


def read(text: TextSource) -> list[str]:
    text.check()
    return [t for u in text.units() for t in text.read(u)]


# One bad record after the good ones: the body, what the sentence says when it stops, what it is counted as.
RECORDS: dict[str, tuple[str, bytes, str, str]] = {
    "cut JSON": ("a.jsonl", LINES + b'{"text": "cut\n' + LINES, "line 9 of FILE is none (", "not JSON"),
    "no JSON": ("a.jsonl", LINES + b"hello\n" + LINES, "line 9 of FILE is none (Expecting value", "not JSON"),
    "two objects": ("a.jsonl", LINES + b"{} {}\n" + LINES, "line 9 of FILE is none (Extra data", "not JSON"),
    "nested deeply": ("a.jsonl", LINES + b"[" * 200_000 + b"\n" + LINES, "nested too deeply", "not JSON"),
    "a huge number": ("a.jsonl", LINES + b'{"n": ' + b"9" * 5000 + b"}\n" + LINES, "Exceeds the limit", "not JSON"),
    "a list": ("a.jsonl", LINES + b"[1]\n" + LINES, "line 9 of FILE is a list", "a list instead of a JSON object"),
    "null": ("a.jsonl", LINES + b"null\n" + LINES, "line 9 of FILE is a null", "a null instead of a JSON object"),
    "a number": ("a.jsonl", LINES + b"7\n" + LINES, "is a number", "a number instead of a JSON object"),
    "no field": ("a.jsonl", LINES + b'{"t": 1}\n' + LINES, "line 9 of FILE has no 'text'", "no field 'text'"),
    "an empty object": ("a.jsonl", LINES + b"{}\n" + LINES, "has no 'text', only none", "no field 'text'"),
    "a number as text": ("a.jsonl", LINES + b'{"text": 1}\n' + LINES, "is a number", "a number instead of text"),
    "a list as text": ("a.jsonl", LINES + b'{"text": []}\n' + LINES, "is a list", "a list instead of text"),
    "latin-1": ("a.jsonl", LINES + b'{"text": "\xe9"}\n' + LINES, "line 9 of FILE is not (byte 11", "not UTF-8"),
    "surrogate bytes": ("a.jsonl", LINES + b'{"text": "\xed\xa0\x80"}\n' + LINES, "is not (byte 11", "not UTF-8"),
    "zeros": ("a.jsonl", LINES + b"\0" * 100 + b"\n" + LINES, "line 9 of FILE is none (Expecting", "not JSON"),
    "a huge line": ("a.jsonl", LINES + b'{"text": "' + b" " * (1 << 20) + b"\n" + LINES, "is none", "not JSON"),
    "a huge line in gz": ("a.jsonl.gz", gzip.compress(LINES + BIG + LINES), "line 9 of FILE is longer", "too long a line"),
    "a huge line in zst": ("a.jsonl.zst", zstandard.compress(LINES + BIG + LINES), "longer; cut", "too long a line"),
    "no JSON in bz2": ("a.jsonl.bz2", bz2.compress(LINES + b"hello\n" + LINES), "line 9 of FILE is none", "not JSON"),
    "no JSON in xz": ("a.jsonl.xz", lzma.compress(LINES + b"hello\n" + LINES), "line 9 of FILE is none", "not JSON"),
    "bytes in Parquet": ("a.parquet", parquet(not_utf8(pa.binary())), "'text' in row 2 of FILE is not", "not UTF-8"),
    "text in Parquet": ("a.parquet", parquet(not_utf8(pa.string())), "'text' in row 2 of FILE is not", "not UTF-8"),
    "text in Arrow": ("a.arrow", arrow(not_utf8(pa.string())), "'text' in row 2 of FILE is not (byte 4", "not UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("case", RECORDS)
def test_a_bad_record_stops_with_a_sentence_or_is_counted(tmp_path: Path, case: str) -> None:
    name, body, words, what = RECORDS[case]
    path = tmp_path / name
    path.write_bytes(body)
    with pytest.raises(DataError) as caught:
        read(source(path))
    assert words.replace("FILE", str(path)) in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700
    text = source(path, on_bad_record=OnBadRecord.skip)
    assert read(text) == (GOOD * 2 if "jsonl" in name else ["good", "good"])
    place = f"line 9 of {path}" if "jsonl" in name else f"row 2 of {path}"
    assert text.notes.counts == {f"bad record passed over: {what}": (1, place)}
    with pytest.raises(
        DataError, match=r"data\.max_bad_records must be .*, but is 0 and one more is there: "
    ) as found:
        read(source(path, on_bad_record=OnBadRecord.skip, max_bad_records=0))
    assert str(path) in str(found.value)


# What no config passes over.
FILES: dict[str, tuple[str, bytes, str]] = {
    "cut gz": ("a.jsonl.gz", gzip.compress(LINES)[:-1], "FILE is cut short after line"),
    "cut zst": ("a.jsonl.zst", zstandard.compress(LINES)[:-1], "FILE is cut short after line"),
    "cut bz2": ("a.jsonl.bz2", bz2.compress(LINES)[:-1], "FILE is cut short after line"),
    "cut xz": ("a.jsonl.xz", lzma.compress(LINES)[:-1], "FILE is cut short after line"),
    "empty gz": ("a.jsonl.gz", b"", "FILE is cut short after line 0"),
    "empty bz2": ("a.jsonl.bz2", b"", "FILE is cut short after line 0"),
    "empty xz": ("a.jsonl.xz", b"", "FILE is cut short after line 0"),
    "no gz": ("a.jsonl.gz", LINES, "FILE is damaged after line 0"),
    "no bz2": ("a.jsonl.bz2", LINES, "FILE is damaged after line 0"),
    "no xz": ("a.jsonl.xz", LINES, "FILE is damaged after line 0"),
    "xz that asks for 4 GiB": ("a.jsonl.xz", with_dictionary_of_4_gib(LINES), "FILE is damaged after line 0 (Memory usage"),
    "behind bz2": ("a.jsonl.bz2", bz2.compress(LINES) + b"more", "FILE is damaged after line 8"),
    "behind xz": ("a.jsonl.xz", lzma.compress(LINES) + b"more, and more of it", "FILE is damaged after line 8"),
    "UTF-16": ("a.jsonl", LINES.decode().encode("utf-16"), "FILE is UTF-16"),
    "empty Parquet": ("a.parquet", b"", "FILE is no whole Parquet file"),
    "cut Parquet": ("a.parquet", parquet(["a"])[:-2], "FILE is no whole Parquet file"),
    "Parquet of another type": ("a.parquet", parquet([1, 2]), "'text' in FILE is of type int64"),
    "Parquet of another column": ("a.parquet", parquet(["a"], "body"), "a column of FILE (body), but 'text' is none"),
    "Arrow as Parquet": ("a.parquet", arrow(["a"]), "FILE is no whole Parquet file"),
    "Parquet as Arrow": ("a.arrow", parquet(["a"]), "FILE is no whole Arrow file"),
    "empty Arrow": ("a.arrow", b"", "FILE is no whole Arrow file"),
    "Arrow of another type": ("a.arrow", arrow([[1]]), "'text' in FILE is of type list<"),
    "an Arrow stream without an end": ("a.arrow", arrow(["a", "b"], closed=False), "FILE is cut short after row 2"),
    "text that is not UTF-8": ("a.txt", b"fine\ncaf\xe9", "line 2 of FILE is not, at byte 8"),
}  # fmt: skip


@pytest.mark.parametrize("on_bad_record", OnBadRecord)
@pytest.mark.parametrize("case", FILES)
def test_a_damaged_file_is_a_sentence_whatever_the_config(
    tmp_path: Path, case: str, on_bad_record: OnBadRecord
) -> None:
    name, body, words = FILES[case]
    path = tmp_path / name
    path.write_bytes(body)
    with pytest.raises(DataError) as caught:
        read(source(path, on_bad_record=on_bad_record))
    assert words.replace("FILE", str(path)) in str(caught.value)
    assert "\n" not in str(caught.value)


EMPTY: dict[str, Callable[[], bytes]] = {
    "a.jsonl": bytes,
    "a.txt": bytes,
    "a.jsonl.gz": lambda: gzip.compress(b""),
    "a.parquet": lambda: parquet(pa.array([], pa.string())),
    "a.arrow": lambda: arrow(pa.array([], pa.string())),
}


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_file_is_named(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / name).write_bytes(EMPTY[name]())
    text = source(tmp_path / name)
    with caplog.at_level(logging.WARNING):
        assert read(text) == []
    if name in ("a.jsonl", "a.txt"):
        assert f"nothing is read from {tmp_path / name}, which is empty" in caplog.text
    else:
        assert text.notes.counts == {"file that holds no record": (1, str(tmp_path / name))}


LINE = st.sampled_from([b'{"text": "x"}', b"bad", b"[]", b"{}", b"\xff", b'{"text": null}', b'{"text": 3}', b""])


@settings(max_examples=60, deadline=None)
@given(lines=st.lists(LINE, max_size=20), most=st.integers(0, 20))
def test_every_record_is_a_text_or_counted_up_to_the_bound(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], most: int
) -> None:
    path = tmp_path_factory.mktemp("bad") / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    bad = [i for i, line in enumerate(lines, 1) if line in (b"bad", b"[]", b"{}", b"\xff", b'{"text": 3}')]
    text = source(path, on_bad_record=OnBadRecord.skip, max_bad_records=most)
    if len(bad) > most:
        with pytest.raises(DataError, match=rf"line {bad[most]} of {re.escape(str(path))}"):
            read(text)
        return
    assert read(text) == ["x"] * lines.count(b'{"text": "x"}')
    counted = sum(count for what, (count, _) in text.notes.counts.items() if what.startswith("bad record"))
    assert counted == len(bad)
    first = {where for what, (_, where) in text.notes.counts.items() if what.startswith("bad record")}
    assert not bad or f"line {bad[0]} of {path}" in first


def test_lines_are_counted_in_every_part_and_the_bound_is_each_parts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(b"bad\n" if i % 10 == 0 else b'{"text": "x"}\n' for i in range(1, 101)))
    text = source(path, on_bad_record=OnBadRecord.skip, max_bad_records=5)
    with pytest.raises(DataError, match="line 60 of"):
        read(text)
    half = path.read_bytes().index(b"bad", path.stat().st_size // 2)
    parts = [CorpusPart(str(path), 0, half), CorpusPart(str(path), half, path.stat().st_size)]
    text = source(path, on_bad_record=OnBadRecord.skip, max_bad_records=5)
    found = [list(text.read(part)) for part in parts]
    assert sum(map(len, found)) == 90
    ((count, where),) = text.notes.counts.values()
    assert (count, where) == (10, f"line 10 of {path}")
