"""Records are the same whatever format holds them; a file that is cut or damaged is refused, wherever it is."""

import bz2
import gzip
import io
import itertools
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings

from regrow.trainer.data.corpus_paths import LocalFile, find_files
from regrow.trainer.data.record_files import read_records, record_parts
from regrow.trainer.data.records import BadRecords, Record, sound
from regrow.trainer.data.source import CorpusPart, DataError, Notes

Rows = list[dict[str, Any]]
KIND = pa.schema(
    [
        ("text", pa.large_string()),
        ("n", pa.int64()),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("meta", pa.struct([("lang", pa.string()), ("score", pa.float64())])),
    ]
)
ROWS: Rows = [
    {
        "text": f"document {i} 🙂",
        "n": i,
        "messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "ü" * i}][: i % 3],
        "meta": {"lang": "en" if i % 2 else "de", "score": i / 8} if i % 5 else None,
    }
    for i in range(30)
]


def lines(rows: Rows) -> bytes:
    return "".join(json.dumps(r) + "\n" for r in rows).encode()


def arrow(rows: Rows, begin: Callable[..., Any], **options: Any) -> bytes:
    out = io.BytesIO()
    with begin(out, KIND, **options) as writer:
        for at in range(0, len(rows), 7):
            writer.write_batch(pa.RecordBatch.from_pylist(rows[at : at + 7], KIND))
    return out.getvalue()


def parquet(rows: Rows, **options: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, KIND), out, row_group_size=7, **options)
    return out.getvalue()


LZ4 = pa.ipc.IpcWriteOptions(compression="lz4")
WRITE: dict[str, Callable[[Rows], bytes]] = {
    "a.jsonl": lines,
    "a.jsonl.gz": lambda r: gzip.compress(lines(r), mtime=0),
    "a.jsonl.zst": lambda r: zstandard.compress(lines(r)),
    "a.jsonl.bz2": lambda r: bz2.compress(lines(r)),
    "a.jsonl.xz": lambda r: lzma.compress(lines(r)),
    "a.parquet": parquet,
    "plain.parquet": lambda r: parquet(r, compression="none", use_dictionary=False, data_page_version="2.0"),
    "stream.arrow": lambda r: arrow(r, pa.ipc.new_stream),
    "file.arrow": lambda r: arrow(r, pa.ipc.new_file),
    "lz4.arrow": lambda r: arrow(r, pa.ipc.new_stream, options=LZ4),
}


def written(folder: Path, name: str, body: bytes) -> Path:
    (folder / name).write_bytes(body)
    return folder / name


def records(path: Path, columns: list[str] | None = None) -> list[Record]:
    parts = record_parts(LocalFile(path))
    return [r for part in parts for r in read_records(part, BadRecords(Notes()), columns)]


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        records(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", WRITE)
def test_every_format_gives_the_same_records_with_their_places(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, name, WRITE[name](ROWS))
    found = records(path)
    assert [r.value for r in found] == ROWS
    unit = "line" if "jsonl" in name else "row"
    assert [str(r.place) for r in found] == [f"{unit} {i + 1} of {path}" for i in range(len(ROWS))]
    whole = read_records(CorpusPart(str(path)), BadRecords(Notes()))
    assert [r.value for r in whole] == ROWS
    if unit == "row":
        assert [r.value for r in records(path, ["n", "meta"])] == [{k: r[k] for k in ("n", "meta")} for r in ROWS]


@pytest.mark.parametrize("name", ["file.arrow", "a.parquet"])
def test_every_part_of_a_table_knows_its_rows(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, name, WRITE[name](ROWS))
    cuts = [0, 1, 3, 3, 5]  # of record batches and row groups of seven rows
    found = []
    for start, stop in itertools.pairwise(cuts):
        part = list(read_records(CorpusPart(str(path), start, stop), BadRecords(Notes()), ["n"]))
        assert [r.value["n"] for r in part] == list(range(7 * start, min(7 * stop, 30)))
        found += [str(r.place) for r in part]
    assert found == [f"row {i + 1} of {path}" for i in range(30)]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
MESSAGE = st.fixed_dictionaries({"role": TEXT, "content": st.none() | TEXT})
ROW = st.fixed_dictionaries(
    {
        "text": st.none() | TEXT,
        "n": st.none() | st.integers(-(2**63), 2**63 - 1),
        "messages": st.none() | st.lists(MESSAGE, max_size=3),
        "meta": st.none() | st.fixed_dictionaries({"lang": st.none() | TEXT, "score": st.floats(allow_nan=False)}),
    }
)


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(ROW, max_size=12))
def test_any_records_come_back_from_every_format(tmp_path_factory: pytest.TempPathFactory, rows: Rows) -> None:
    folder = tmp_path_factory.mktemp("any")
    for name, write in WRITE.items():
        assert [r.value for r in records(written(folder, name, write(rows)))] == rows, name


@pytest.mark.parametrize("name", [n for n in WRITE if n != "a.jsonl"])
def test_a_file_cut_anywhere_is_refused_by_its_name(tmp_path: Path, name: str) -> None:
    body = WRITE[name](ROWS[:15])
    step = max(1, len(body) // 150)
    # Each of the first and last bytes, and between record batches, where a stream might end.
    stops = {*range(0, len(body), step), *range(20), *range(len(body) - 20, len(body))}
    if name == "stream.arrow":
        message = b"\xff\xff\xff\xff"
        stops |= {i for i in range(len(body)) if body.startswith(message, i)}
    for stop in sorted(stops):
        sentence = refusal(written(tmp_path, name, body[:stop]))
        assert str(tmp_path / name) in sentence
        assert "is cut short" in sentence or "is no whole" in sentence, (stop, sentence)


@pytest.mark.parametrize("name", [n for n in WRITE if n != "a.jsonl"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_a_sentence_or_leaves_records_whole(tmp_path: Path, name: str, data: st.DataObject) -> None:
    """Formats without checksums cannot tell every damage; what they give is still text that UTF-8 can hold."""
    body = bytearray(WRITE[name](ROWS[:15]))
    at = data.draw(st.integers(0, len(body) - 1))
    body[at] ^= data.draw(st.integers(1, 255))
    try:
        found = records(written(tmp_path, name, bytes(body)))
    except DataError as error:
        assert "\n" not in str(error)
        assert str(tmp_path / name) in str(error)
        return
    str([r.value for r in found]).encode()
    if name.endswith((".bz2", ".xz")):  # whose checksums cover all that is read
        assert [r.value for r in found] == ROWS[:15]


def test_a_stream_with_something_behind_it_is_refused(tmp_path: Path) -> None:
    body = WRITE["stream.arrow"](ROWS)
    assert f"goes on after its end at byte {len(body)}" in refusal(written(tmp_path, "a.arrow", body + body))
    assert "is no whole Arrow file" in refusal(written(tmp_path, "b.arrow", WRITE["a.parquet"](ROWS)))


def test_text_that_is_not_utf8_is_a_bad_record_of_its_row(tmp_path: Path) -> None:
    texts = pa.array([b"fine", b"caf\xe9", b"fine"]).view(pa.string())
    table = pa.table({"t": pa.array([0, 1, 2]), "m": pa.StructArray.from_arrays([texts], ["text"])})
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as out:
        out.write_table(table)
    pq.write_table(table, tmp_path / "a.parquet")
    for name in ("a.arrow", "a.parquet"):
        assert f"'m' in row 2 of {tmp_path / name} is not (byte 4" in refusal(tmp_path / name)


def test_offsets_that_lead_beyond_a_damaged_file_are_found(tmp_path: Path) -> None:
    body = bytearray(arrow([{**ROWS[1], "text": "x" * 64}], pa.ipc.new_stream))
    at = body.index((64).to_bytes(8, "little"), body.index(b"\xff\xff\xff\xff", 8))
    for place in range(at, len(body) - 8, 8):
        if body[place - 8 : place + 8] == bytes(8) + (64).to_bytes(8, "little"):
            body[place : place + 8] = (1 << 40).to_bytes(8, "little")
    assert "is no whole Arrow file" in refusal(written(tmp_path, "a.arrow", bytes(body)))


def test_lone_surrogates_are_replaced_at_any_depth(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", rb'{"a": [{"b": "x \ud83d"}, "\ud83d\ude42", 1, null]}')
    (record,) = records(path)
    notes = Notes()
    assert sound(record.value, record.place, notes) == {"a": [{"b": "x \ufffd"}, "🙂", 1, None]}
    assert [v for _, v in notes.counts.items()] == [(1, f"line 1 of {path}")]


def saved(folder: Path, shards: list[Rows], **state: Any) -> Path:
    """What `datasets` 5.2 leaves, seen with the package itself: streams of batches, and their names in state.json."""
    folder.mkdir()
    names = [f"data-{i:05}-of-{len(shards):05}.arrow" for i in range(len(shards))]
    for name, rows in zip(names, shards, strict=True):
        (folder / name).write_bytes(WRITE["stream.arrow"](rows))
    (folder / "dataset_info.json").write_text('{"citation": "", "features": {}}')
    about = {"_data_files": [{"filename": n} for n in names], "_fingerprint": "9617a555ce45a689", "_split": None}
    (folder / "state.json").write_text(json.dumps(about | {"_format_type": None} | state))
    return folder


def test_a_saved_dataset_is_its_shards_in_the_order_it_names(tmp_path: Path) -> None:
    folder = saved(tmp_path / "d", [ROWS[20:], ROWS[:20]])
    written(folder, "other.arrow", b"no part of it")
    files = find_files([str(folder), str(tmp_path / "d*")])
    assert [Path(f.name).name for f in files] == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    assert [r.value for f in files for r in records(Path(f.name))] == [*ROWS[20:], *ROWS[:20]]


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"_data_files": []}, "has no file of them"),
        ({"_data_files": [{"filename": "../a.arrow"}]}, "cannot be read"),
        ({"_data_files": [{"filename": "a.txt"}]}, "names a.txt"),
        ({"_data_files": 5}, "cannot be read (expected `array`"),
        ({"_indices_data_files": [{"filename": "i.arrow"}]}, "has a selection of rows beside it"),
    ],
)
def test_a_saved_dataset_that_is_not_one_corpus_is_refused(tmp_path: Path, state: dict[str, Any], words: str) -> None:
    folder = saved(tmp_path / "d", [ROWS], **state)
    with pytest.raises(DataError) as caught:
        find_files([str(folder)])
    assert words in str(caught.value)
    assert str(folder) in str(caught.value)


def test_several_saved_datasets_are_refused_with_their_names(tmp_path: Path) -> None:
    saved(tmp_path / "train", [ROWS])
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=r"holds several \(train, test\); use for instance .*/train"):
        find_files([str(tmp_path)])


@pytest.mark.parametrize("name", ["stream.arrow", "file.arrow", "lz4.arrow"])
def test_no_length_that_an_arrow_file_claims_is_believed(tmp_path: Path, name: str) -> None:
    """Written over each place where one may be, of messages, buffers, offsets or the footer."""
    body = WRITE[name](ROWS[:7])
    refused = 0
    for at in range(0, len(body) - 7, 8):
        changed = body[:at] + (2**62).to_bytes(8, "little") + body[at + 8 :]
        try:
            str([r.value for r in records(written(tmp_path, name, changed))]).encode()
        except DataError as error:
            assert str(tmp_path / name) in str(error)
            refused += 1
    assert refused > len(body) // 32
