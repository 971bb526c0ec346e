"""Data that a whole command refuses: one sentence with file and line, exit code 2, no run folder left behind."""

import json
import lzma
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from regrow.trainer.data.tokenizer import train_bpe
from tests.faults.test_inputs import one_sentence, run_here
from tests.support import tiny

pytestmark = pytest.mark.slow

GOOD = '{"text": "a text of some words, and some more words"}\n'


def write(name: str, body: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(body.encode() if isinstance(body, str) else body)


def sparse(folder: Path) -> None:
    """A tokenizer whose largest id lies far beyond the number of its tokens."""
    train_bpe(["a text of some words"] * 3, 270, folder / "sparse.json")
    document = json.loads((folder / "sparse.json").read_text())
    document["model"]["vocab"]["<|sep|>"] = 70_000
    (folder / "sparse.json").write_text(json.dumps(document))
    write("c.jsonl", GOOD * 50)(folder)


def datasets(folder: Path) -> None:
    """A folder as `DatasetDict.save_to_disk` leaves it."""
    (folder / "d").mkdir()
    write("d/dataset_dict.json", '{"splits": ["train"]}')(folder)


# What makes the files, arguments, and what the sentence must say.
WRONG: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "broken JSON": (write("c.jsonl", GOOD * 8 + '{"text": "cut'), ["data.files=[c.jsonl]"],
                    r"data.files .* line 9 of c.jsonl is none \(Unterminated string starting at character 9\).*; mend or remove it"),
    "another type": (write("c.jsonl", GOOD + '{"text": 7}'), ["data.files=[c.jsonl]"],
                     r"data.field must name text, but 'text' in line 2 of c.jsonl is a number; set data.field"),
    "another field": (write("c.jsonl", GOOD), ["data.files=[c.jsonl]", "data.field=body"],
                      r"data.field must be a field of every record, but line 1 of c.jsonl has no 'body', only 'text'"),
    "a folder": (lambda f: (f / "corpus").mkdir(), ["data.files=[corpus]"],
                 r"data.files must name files, but corpus is a folder; use for instance corpus/\*.jsonl"),
    "a pipe": (lambda f: os.mkfifo(f / "p.jsonl"), ["data.files=[p.jsonl]"],
               r"data.files must be files that can be read, but p.jsonl cannot \(Not a regular file\)"),
    "not UTF-8": (write("c.txt", b"caf\xe9 " * 50), ["data.files=[c.txt]"],
                  r"data.files must be UTF-8, but line 1 of c.txt is not, at byte 3"),
    "brackets": (write("a[1].txt", b"\xff\xfea\0"), ["data.files=['a[1].txt']"],
                 r"data.files must be UTF-8, but a\[1\].txt is UTF-16; convert it \(iconv"),
    "a cut .xz": (write("c.jsonl.xz", lzma.compress(GOOD.encode() * 50)[:-5]), ["data.files=[c.jsonl.xz]"],
                  r"data.files must be whole, but c.jsonl.xz is cut short after line \d+; fetch or compress it again"),
    "too many bad records": (write("c.jsonl", GOOD * 8 + "bad\n" * 3), ["data.files=[c.jsonl]", "data.on_bad_record=skip", "data.max_bad_records=2"],
                             r"data.max_bad_records must be at least .*, but is 2 and one more is there: .* line 11 of c.jsonl is none"),
    "a filter": (write("c.jsonl", GOOD), ["data.files=[c.jsonl]", "+data.where={text:[[1]]}"],
                 r"data.where.text must be a text, number, true, false or null, or a list of them, but is \[\[1\]\]; correct it"),
    "a path": (write("c.jsonl", GOOD), ["data.files=[c.jsonl]", "data.field=text.body"],
               r"data.field must be a field of every record, but line 1 of c.jsonl has no 'text.body', only 'text'"),
    "several datasets": (datasets, ["data.files=[d]"],
                         r"data.files must name one dataset, but d holds several \(train\); use for instance d/train"),
    "a URL": (write("c.jsonl", GOOD), ["data.files=['nothing://bucket/*.jsonl']"],
              r"data.files must be paths, or URLs that obstore or fsspec open, but holds nothing://bucket/\*.jsonl"),
    "tokenizer": (write("t.json", "[" * 100_000), ["data.tokenizer=t.json"],
                  r"data.tokenizer must be a Hugging Face tokenizer.json, but t.json is not"),
    "vocabulary": (sparse, ["data.files=[c.jsonl]", "data.tokenizer=sparse.json"],
                   r"model.vocab_size must be at least the tokenizer's \(70001\), but is 320; use model.vocab_size=70001"),
    "size of the BPE": (write("c.jsonl", GOOD), ["data.files=[c.jsonl]", "data.tokenizer_vocab_size=-4"],
                        r"data.tokenizer_vocab_size must be at least 1 and at most \d+, but is -4; use 4096"),
    "cache": (write("file", ""), ["data.cache=file"],
              r"data.cache must be a folder that can be written, but file.* cannot \(Not a directory\); .* choose another one"),
    "end of text": (write("c.jsonl", GOOD), ["data.files=[c.jsonl]", "data.eos_token=nothing"],
                    r"data.eos_token must name a token of .*, but none of nothing is one; set data.eos_token"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_bad_data_is_one_sentence(
    case: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make, wrong, pattern = WRONG[case]
    make(tmp_path)
    names = {w.split("=")[0] for w in wrong}
    arguments = [a for a in tiny(corpus, "run.name=a", "hooks=none") if a.split("=")[0] not in names]
    cache = [] if "data.cache" in names else [f"data.cache={tmp_path / 'cache'}"]
    arguments = [a for a in arguments if not a.startswith("data.cache")]
    code, err = run_here([*arguments, *wrong, *cache], monkeypatch, capsys)
    assert code == 2, err
    assert re.search(pattern, one_sentence(err)), err
    assert not (tmp_path / "outputs/a").exists()
    assert not list(tmp_path.rglob("shard-*"))
