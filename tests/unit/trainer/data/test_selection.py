"""Texts by config: fields, paths, joins and filters; what is left out is counted."""

import json
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from omegaconf import OmegaConf

from regrow.trainer.data.config import OnBadRecord, TextConfig
from regrow.trainer.data.source import DataError
from regrow.trainer.data.text import TextSource

ROWS: list[dict[str, Any]] = [
    {"text": "one", "title": "A", "meta": {"lang": "en", "text": "inner one"}, "score": 0.1, "stars": 1},
    {"text": "two", "title": "", "meta": {"lang": "de", "text": "inner two"}, "score": 0.5, "stars": 2},
    {"text": "three", "title": None, "meta": {"lang": None, "text": "inner three"}, "score": None, "stars": 3},
    {"text": None, "title": None, "meta": None, "score": 0.9, "stars": 4},
    {"text": "five", "title": "E", "meta": {"lang": "fr", "text": None}, "score": 1.0, "stars": 5},
]
FORMATS = ["a.jsonl", "a.parquet", "a.arrow"]


def written(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    path = folder / name
    if name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    elif name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(path, table.schema) as out:
            out.write_table(table)
    return str(path)


def read(source: TextSource) -> list[str]:
    source.check()
    return [t for u in source.units() for t in source.read(u)]


@pytest.fixture(params=FORMATS)
def file(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return written(tmp_path, request.param, ROWS)


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        ({}, ["one", "two", "three", "five"]),
        ({"field": "meta.text"}, ["inner one", "inner two", "inner three"]),
        ({"fields": ["title", "text"]}, ["A\n\none", "two", "three", "E\n\nfive"]),
        ({"fields": ["meta.text", "title"], "join": " | "}, ["inner one | A", "inner two", "inner three", "E"]),
        ({"fields": ["text", "title"], "join": r"\n\t"}, ["one\n\tA", "two", "three", "five\n\tE"]),
        ({"where": {"meta.lang": "en"}}, ["one"]),
        ({"where": {"meta": {"lang": ["en", "de"]}}}, ["one", "two"]),
        ({"where": {"meta": {"lang": [None]}}}, ["three"]),
        ({"where": {"stars": [1, 5.0], "title": "E"}}, ["five"]),
        ({"where_min": {"score": 0.5}}, ["two", "five"]),
        ({"where_max": {"score": 0.5}}, ["one", "two"]),
        ({"where_min": {"stars": 2}, "where_max": {"stars": 3, "score": 1}}, ["two"]),
    ],
    ids=str,
)
def test_the_config_decides_which_texts_are_read(file: str, options: dict[str, Any], texts: list[str]) -> None:
    source = TextSource(TextConfig(files=[file], **options))
    assert read(source) == texts
    # Nothing is dropped silently.
    assert sum(count for count, _ in source.notes.counts.values()) == len(ROWS) - len(texts)


def test_what_is_left_out_is_counted_by_its_reason_with_the_first_place(file: str) -> None:
    source = TextSource(TextConfig(files=[file], where_min={"score": 0.5}, where={"meta.lang": ["de", "fr"]}))
    assert read(source) == ["two", "five"]
    unit = "line" if file.endswith("jsonl") else "row"
    assert source.notes.counts == {
        "record left out by data.where.meta.lang": (1, f"{unit} 1 of {file}"),
        "record left out by data.where.meta.lang, as it is missing or null": (2, f"{unit} 3 of {file}"),
    }


def test_a_name_with_a_dot_is_a_name_before_it_is_a_path(tmp_path: Path) -> None:
    for name in FORMATS:
        file = written(tmp_path, name, [{"a.b": "by name", "a": {"b": "by path"}}])
        assert read(TextSource(TextConfig(files=[file], field="a.b"))) == ["by name"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"field": "body"}, "data.field must be a"),
        ({"fields": ["text", "body"]}, "data.fields must be a"),
        ({"field": "meta.body"}, "'meta.body'"),
        ({"field": "text.body"}, "'text.body'"),
        ({"field": "meta"}, "'meta' in"),
        ({"field": "stars"}, "'stars' in"),
        ({"where": {"lang": {}, "x": []}}, "data.where.x must be a text, number, true, false or null, or a list"),
        ({"where": {"x": [[1]]}}, "data.where.x must be"),
        ({"where_min": {"score": float("nan")}}, "data.where_min.score must be a finite number, but is nan"),
        ({"where_min": {"s": 2.0}, "where_max": {"s": 1.0}}, "data.where_min.s must be at most data.where_max.s"),
        ({"max_bad_records": -1}, "data.max_bad_records must be at least 0, but is -1; use 1000"),
    ],
    ids=str,
)
def test_a_selection_that_cannot_be_is_one_sentence(file: str, options: dict[str, Any], words: str) -> None:
    source = TextSource(TextConfig(files=[file], **options))

    def begin() -> None:
        source.check()
        source.units()  # before anything is tokenised

    with pytest.raises(DataError) as caught:
        begin()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_filter_by_a_column_that_a_table_lacks_is_refused(tmp_path: Path) -> None:
    for name in FORMATS[1:]:
        source = TextSource(TextConfig(files=[written(tmp_path, name, ROWS)], where={"language": "en"}))
        with pytest.raises(DataError, match="data.where must be a column of .* 'language' is none"):
            source.units()


def test_text_files_have_nothing_to_filter_by(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match="data.where must filter records, but .*a.txt has none"):
        TextSource(TextConfig(files=[str(tmp_path / "a.txt")], where={"x": 1})).check()


VALUE = st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from([0.0, 1.0, 1.5, "a", "1", ""])


@settings(max_examples=100, deadline=None)
@given(values=st.lists(VALUE, max_size=8), allowed=st.lists(VALUE, min_size=1, max_size=3))
def test_a_filter_keeps_what_is_equal_in_json(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], allowed: list[Any]
) -> None:
    """Compared with equality of canonical JSON, where numbers are numbers and nothing else is one."""

    def canonical(value: Any) -> str:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return json.dumps(float(value) if number else value)

    rows = [{"text": f"t{i}", "v": v} for i, v in enumerate(values)]
    file = written(tmp_path_factory.mktemp("eq"), "a.jsonl", rows)
    source = TextSource(TextConfig(files=[file], where={"v": allowed}))
    wanted = [r["text"] for r in rows if canonical(r["v"]) in map(canonical, allowed)]
    assert [t for u in source.units() for t in source.read(u)] == wanted


def test_what_decides_the_documents_is_in_the_key_and_only_then(tmp_path: Path) -> None:
    file = written(tmp_path, "a.jsonl", ROWS)

    def key(**options: Any) -> dict[str, str]:
        return TextSource(TextConfig(files=[file], cache=str(tmp_path / "c"), **options)).key()

    first = key()
    # As version 0.1.0 had it, so that what is cached stays found.
    assert set(first) == {"the text", "data.field", "data.txt_document_bytes"}
    assert key(max_bad_records=5, join="-") == first
    others = [
        key(**o)
        for o in (
            {"fields": ["text"]},
            {"fields": ["text", "title"]},
            {"fields": ["text", "title"], "join": "-"},
            {"where": {"a": 1}},
            {"where": {"a": True}},
            {"where": {"a": [1, 2]}},
            {"where_min": {"a": 1.0}},
            {"where_max": {"a": 1.0}},
            {"on_bad_record": OnBadRecord.skip},
        )
    ]
    assert len({json.dumps(k, sort_keys=True) for k in [first, *others]}) == 1 + len(others)
    assert key(where={"a": {"b": 1}}) == key(where={"a.b": [1]})


def test_hydra_can_set_each_of_them() -> None:
    made = OmegaConf.merge(
        OmegaConf.structured(TextConfig(seq_len=1, global_batch_size=1, micro_batch_size=1)),
        {"where": {"lang": ["en", None]}, "where_min": {"score": 1}, "fields": ["a"], "on_bad_record": "skip"},
    )
    config = OmegaConf.to_object(made)
    assert isinstance(config, TextConfig)
    assert (config.where, config.where_min) == ({"lang": ["en", None]}, {"score": 1.0})
    assert config.on_bad_record is OnBadRecord.skip
