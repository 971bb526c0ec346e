"""Conversations and records that a whole command meets: one sentence with file and line, or skips that are counted."""

import bz2
import dataclasses
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from tests.faults.test_inputs import one_sentence, run_here
from tests.support import ONE_THREAD, TINY_MODEL
from tests.unit.trainer.data.chat.families import FAMILIES, Family, save_family

pytestmark = pytest.mark.slow

USER = {"role": "user", "content": "the weather?"}
SUNNY = {"role": "assistant", "content": "It is sunny in Paris, and a line of text."}
GOOD = json.dumps({"messages": [USER, SUNNY] * 4}) + "\n"
Make = Callable[[Path], object]


def lines(*records: Any, name: str = "c.jsonl", good: int = 3) -> Make:
    """A file of some good records and these."""
    body = GOOD * good + "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records)
    return lambda folder: (folder / name).write_text(body)


def raw(name: str, body: bytes) -> Make:
    return lambda folder: (folder / name).write_bytes(body)


def table(column: pa.Array, name: str = "messages") -> Make:
    return lambda folder: pq.write_table(pa.table({name: column}), folder / "c.parquet")


def chat(*turns: Any) -> dict[str, Any]:
    return {"messages": list(turns)}


MANY = GOOD.encode() * 200
# What makes the file, its name, further arguments, and what the sentence must say.
WRONG: dict[str, tuple[Make, str, list[str], str]] = {
    "cut gzip": (raw("c.jsonl.gz", gzip.compress(MANY)[:-9]), "c.jsonl.gz", [],
                 r"data.files must be whole, but c.jsonl.gz is cut short after line \d+; fetch or compress it again"),
    "cut zstd": (raw("c.jsonl.zst", zstandard.compress(MANY)[:-9]), "c.jsonl.zst", [],
                 r"data.files must be whole, but c.jsonl.zst is cut short"),
    "cut bzip2": (raw("c.jsonl.bz2", bz2.compress(MANY)[:-9]), "c.jsonl.bz2", [],
                  r"data.files must be whole, but c.jsonl.bz2 is cut short"),
    "no gzip": (raw("c.jsonl.gz", MANY), "c.jsonl.gz", [], r"data.files must be .*, but c.jsonl.gz "),
    "not UTF-8": (raw("c.jsonl", MANY + b'{"messages": "caf\xe9"}\n'), "c.jsonl", [],
                  r"data.files must be UTF-8, but line 201 of c.jsonl is not"),
    "cut JSON": (lines('{"messages": [{"role"'), "c.jsonl", [], r"line 4 of c.jsonl is none"),
    "a number": (lines("7"), "c.jsonl", [], r"line 4 of c.jsonl"),
    "no field of ours": (lines({"dialog": []}), "c.jsonl", [], r"line 4 of c.jsonl.*messages"),
    "null turns": (lines({"messages": None}), "c.jsonl", [], r"line 4 of c.jsonl"),
    "no turns": (lines(chat()), "c.jsonl", [], r"line 4 of c.jsonl"),
    "a turn that is none": (lines(chat("hello")), "c.jsonl", [], r"line 4 of c.jsonl"),
    "no role": (lines(chat({"content": "a"})), "c.jsonl", [], r"line 4 of c.jsonl.*role"),
    "no content": (lines(chat(USER, {"role": "assistant"})), "c.jsonl", [], r"line 4 of c.jsonl"),
    "content of another type": (lines(chat({"role": "user", "content": 4})), "c.jsonl", [], r"line 4 of c.jsonl"),
    "ShareGPT without a value": (lines({"conversations": [{"from": "human"}]}), "c.jsonl", [], r"line 4 of c.jsonl"),
    "prompt alone": (lines({"prompt": "a"}), "c.jsonl", [], r"line 4 of c.jsonl"),
    "tools that are none": (lines({**chat(USER, SUNNY), "tools": "x"}), "c.jsonl", [], r"line 4 of c.jsonl.*tools"),
    "roles out of order": (lines(chat(SUNNY, USER)), "c.jsonl", [], r"line 4 of c.jsonl.*alternate"),
    "numbers in Parquet": (table(pa.array([1, 2])), "c.parquet", [], r"c.parquet"),
    "another column": (table(pa.array(["a", "b"]), "body"), "c.parquet", [], r"c.parquet.*(messages|body)"),
    "no Parquet": (raw("c.parquet", MANY), "c.parquet", [], r"c.parquet"),
    "empty": (raw("c.jsonl", b""), "c.jsonl", [], r"data: the corpus .* must not be empty, but has no text"),
    "too many bad": (lines("x", "y", "z"), "c.jsonl", ["data.on_bad_record=skip", "data.max_bad_records=2"],
                     r"data.max_bad_records must be at least .*, but is 2 and one more is there: .*line 6 of c.jsonl"),
    "nothing to learn": (lines(chat(USER), chat(USER), good=0), "c.jsonl", [],
                         r"data.*(label|empty)"),
    "another template": (lines(), "c.jsonl", ["data.template=rag"], r"data.template must .*rag"),
    "no date": (lines(), "c.jsonl", ["data.template_date=tomorrow"], r"data.template_date must .*tomorrow"),
}  # fmt: skip


def command(folder: Path, family: Family, name: str, *more: str) -> list[str]:
    """A run of one step on a file of conversations."""
    save_family(folder / "tokenizer", family)
    sizes = [o for o in TINY_MODEL if "vocab" not in o]
    return [
        *sizes, *ONE_THREAD, "model.vocab_size=450", "data=chat", f"data.files=[{name}]", "data.tokenizer=tokenizer",
        "data.seq_len=96", "data.global_batch_size=1", "data.micro_batch_size=1", "data.validation_fraction=0.0",
        f"data.cache={folder / 'cache'}", "data.workers=1", "run.name=a", "hooks=none", "train.steps=1",
        "checkpoint=disabled", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_sentence_with_file_and_line(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make, name, more, pattern = WRONG[case]
    make(tmp_path)
    code, err = run_here(command(tmp_path, FAMILIES["gemma"], name, *more), monkeypatch, capsys)
    assert code == 2, err
    assert re.search(pattern, one_sentence(err)), err
    assert not (tmp_path / "outputs/a").exists()


def test_a_template_that_raises_names_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines(chat({"role": "ghost", "content": "boo"}))(tmp_path)
    family = dataclasses.replace(
        FAMILIES["gemma"],
        template="{% for m in messages %}{% if m.role == 'ghost' %}{{ raise_exception('no ghosts') }}{% endif %}"
        "{{ m.role + ':' + m.content }}{% endfor %}",
    )
    code, err = run_here(command(tmp_path, family, "c.jsonl"), monkeypatch, capsys)
    assert code == 2, err
    assert re.search(r"line 4 of c.jsonl.*no ghosts", one_sentence(err)), err


SKIPPED = [
    "x", "7", {"dialog": []}, chat(), chat({"content": "a"}), chat(SUNNY, USER), {"messages": None},
    chat({"role": "user", "content": 4}), {"prompt": "a"}, chat(USER),
]  # fmt: skip


def test_what_is_skipped_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a run trains on what is left, half a surrogate pair replaced."""
    monkeypatch.chdir(tmp_path)
    half = json.dumps(chat(USER, {"role": "assistant", "content": "sunny \ud83d"}))
    lines(*SKIPPED, half)(tmp_path)
    arguments = command(tmp_path, FAMILIES["gemma"], "c.jsonl", "data.on_bad_record=skip")
    code, err = run_here(arguments, monkeypatch, capsys)
    assert code == 0, err
    counts = [int(n) for n in re.findall(r"(\d+) x [^\n]*; the first is line \d+ of c.jsonl", err)]
    assert sum(counts) == len(SKIPPED) + 1, err
    assert "surrogate" in err
