"""`regrow-eval` gives what a direct computation in float64 gives, and what lm_eval's rules say of it."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

import regrow
from regrow.launch.commands import evaluate
from regrow.models.base import LanguageModel
from regrow.trainer.data.tokenizer import END_OF_TEXT
from tests.runs import train
from tests.support import tiny
from tests.unit.trainer.data.chat.families import FAMILIES, save_family

pytestmark = pytest.mark.slow

Command = Callable[..., tuple[int, str, str]]
TEXTS = ["a few words and some more of them", "words " * 40, "x"]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Calls it in this process; gives exit code, output and what was said."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["regrow-eval", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            evaluate.main()
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    train(tiny(corpus, "train.steps=30", "optimizer.lr=3e-3", "hooks=none", "model.max_seq_len=48"), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def loaded(run: Path) -> tuple[LanguageModel, Tokenizer]:
    return regrow.load_model(run, dtype=torch.float64)


@torch.no_grad()
def logprob(model: LanguageModel, ids: list[int], asked: int) -> float:
    """Of the last tokens."""
    logits = model(torch.tensor([ids[:-1]]))[0, -asked:]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(ids[-asked:])[:, None]).sum())


def write(file: Path, *lines: Any) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_choices_and_clozes(
    command: Command, run: Path, loaded: tuple[LanguageModel, Tokenizer], tmp_path: Path
) -> None:
    model, tokenizer = loaded
    items: list[dict[str, Any]] = [
        {"query": "a few", "choices": [" words", " x", " and so on"], "gold": n % 3} for n in range(3)
    ] + [{"query": "", "choices": ["of them", "q"], "gold": 1}]
    (tmp_path / "tasks").mkdir()
    write(tmp_path / "tasks/choose.jsonl", *items)
    write(tmp_path / "tasks/last.jsonl", *({"cloze": t.strip()} for t in TEXTS[:2]))
    code, out, err = command(run, "--tasks", tmp_path / "tasks", "--json", "--dtype", "float64")
    assert code == 0, err
    found = json.loads(out)
    end = tokenizer.encode(END_OF_TEXT).ids[0]
    right = normed = 0
    for item in items:
        scores = []
        for choice in item["choices"]:
            begun = tokenizer.encode(item["query"]).ids
            whole = tokenizer.encode(item["query"] + choice).ids
            scores.append(logprob(model, whole if begun else [end, *whole], len(whole) - len(begun)))
        right += max(range(len(scores)), key=lambda n: scores[n]) == item["gold"]
        by_length = [s / len(c) for s, c in zip(scores, item["choices"], strict=True)]
        normed += max(range(len(scores)), key=lambda n: by_length[n]) == item["gold"]
    assert found["choose"] == {"acc": right / 4, "acc_norm": normed / 4, "items": 4}
    assert found["last"]["ppl"] > 1
    assert found["last"]["items"] == 2


def test_perplexity_in_windows(
    command: Command, run: Path, loaded: tuple[LanguageModel, Tokenizer], tmp_path: Path
) -> None:
    """One text is longer than the model's longest sequence."""
    model, tokenizer = loaded
    file = write(tmp_path / "texts.jsonl", *({"text": t} for t in TEXTS))
    code, out, err = command(run, "--tasks", file, "--json", "--dtype", "float64", "--batch-size", 2)
    assert code == 0, err
    end, total, tokens = tokenizer.encode(END_OF_TEXT).ids[0], 0.0, 0
    for text in TEXTS:
        ids = [end, *tokenizer.encode(text).ids]
        done = 1
        while done < len(ids):
            stop = min(len(ids), done + 48)
            total += logprob(model, ids[max(0, stop - 49) : stop], stop - done)
            done = stop
        tokens += len(ids) - 1
    assert tokens > 60
    size = sum(len(t.encode()) for t in TEXTS)
    (metrics,) = json.loads(out).values()
    assert metrics["ppl"] == pytest.approx(math.exp(-total / tokens), rel=1e-10)
    assert metrics["bits_per_byte"] == pytest.approx(-total / size / math.log(2), rel=1e-10)


def test_what_is_written(
    command: Command, run: Path, loaded: tuple[LanguageModel, Tokenizer], tmp_path: Path
) -> None:
    model, tokenizer = loaded
    (made,) = model.generate([tokenizer.encode("a few").ids], max_tokens=5, temperature=0)
    text = tokenizer.decode(made.ids)
    lines = [
        {"query": "a few", "answer": text, "max_tokens": 5, "stop": ["\u0000"]},
        {"query": "a few", "answer": "nothing of the kind", "max_tokens": 5},
        {
            "query": "a few",
            "answer": ["no", text[:2].strip() or text[:3].strip()],
            "regex": r"^\s*(\S{1,2})",
            "max_tokens": 5,
        },
    ]
    file = write(tmp_path / "w.jsonl", *lines)
    code, out, err = command(run, run / "checkpoint/step-30", "--tasks", file, "--dtype", "float64")
    assert code == 0, err
    assert len(out.splitlines()) == 2
    assert "w  exact_match 0." in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--tasks", "none.jsonl"], "--tasks must name files that can be read, but none.jsonl cannot"),
        (["--tasks", "t.jsonl", "--few-shot", "9"], "--few-shot must be below the number of a task's items"),
        (["--tasks", "t.jsonl", "--few-shot", "-1"], "--few-shot must be at least 0, but is -1"),
        (["--tasks", "t.jsonl", "--batch-size", "0"], "--batch-size must be at least 1, but is 0; use 16"),
        (["--tasks", "t.jsonl", "--device", "tpu"], "--device must be one that is here, but is tpu"),
        (["--tasks", "t.jsonl", "--tokenizer", "other"], "the tokenizer must be the model's, which knows 320 tokens"),
        (["--tasks", "long.jsonl"], "what is asked for must be at most as long as the longest sequence"),
        (["--tasks", "bad.jsonl"], "gold must be the number of a choice"),
    ],
)
def test_bad_input_is_one_sentence(
    command: Command, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    choice = {"query": "a", "choices": [" b", " c"], "gold": 0}
    write(tmp_path / "t.jsonl", choice, choice)
    write(tmp_path / "long.jsonl", {**choice, "choices": ["word " * 90, "b"]})
    write(tmp_path / "bad.jsonl", {**choice, "gold": 7})
    save_family(tmp_path / "other", FAMILIES["qwen3"])
    code, _, err = command(run, *arguments)
    assert code == 2
    (line,) = [x for x in err.splitlines() if x.startswith("error: ")]
    assert sentence in line, line
    assert "Traceback" not in err


def test_what_is_no_checkpoint(command: Command, tmp_path: Path) -> None:
    file = write(tmp_path / "t.jsonl", {"text": "a"})
    code, _, err = command(tmp_path / "nowhere", "--tasks", file)
    assert (code, err.count("error: ")) == (2, 1)
