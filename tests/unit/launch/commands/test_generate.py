"""`regrow-generate` as it is called."""

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import regrow
from regrow.launch.commands import generate
from tests.runs import train
from tests.support import tiny

pytestmark = pytest.mark.slow

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Calls it in this process; gives exit code, output and what was said."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["regrow-generate", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            generate.main()
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    train(tiny(corpus, "train.steps=4", "hooks=none", "model.max_seq_len=64"), folder / "run")
    return folder / "run"


def test_prompts_are_continued(command: Command, run: Path, tmp_path: Path) -> None:
    model, tokenizer = regrow.load_model(run)
    ids = tokenizer.encode("a few").ids
    (expected,) = model.generate([ids], max_tokens=6, temperature=0, logprobs=2)
    code, out, err = command(run, "-p", "a few", "--max-tokens", 6, "--temperature", 0, "--json", "--logprobs", 2)
    (found,) = json.loads(out)
    assert (code, found["ids"], found["reason"]) == (0, expected.ids, "length"), err
    assert found["text"] == tokenizer.decode(expected.ids)
    assert found["logprobs"] == pytest.approx(expected.logprobs)
    assert [len(place) for place in found["alternatives"]] == [2] * 6
    code, out, _ = command(run, "-p", "a few", "--max-tokens", 6, "--temperature", 0)
    assert (code, out) == (0, f"{found['text']}\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a few"}\n\n{"prompt": "more words"}\n')
    code, out, _ = command(run, "--file", tmp_path / "p.jsonl", "--max-tokens", 6, "--temperature", 0)
    assert out.startswith(f"=== a few\n{found['text']}\n\n=== more words\n")
    stop = found["text"][3:5]
    code, out, _ = command(run, "-p", "a few", "--max-tokens", 6, "--temperature", 0, "--stop", stop, "--json")
    (cut,) = json.loads(out)
    assert (cut["text"], cut["reason"]) == (found["text"][: found["text"].index(stop)], "stop")
    code, out, _ = command(run, "-p", "a few", "--max-tokens", 500, "--temperature", 0, "--json")
    (longest,) = json.loads(out)
    assert longest["reason"] in ("context", "stop")
    assert len(ids) + len(longest["ids"]) <= 64


def test_a_talk(command: Command, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its turns are those of the template, and what was said before is in each."""
    shutil.copy(run / "tokenizer.json", tmp_path)
    template = "{% for m in messages %}{{ m.role[0] + m.content + ' ' }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    monkeypatch.setattr("sys.stdin", io.StringIO("we\n\nso\n"))
    how = ["--tokenizer", tmp_path, "--max-tokens", 3, "--temperature", 0]
    code, out, err = command(run, "--chat", *how)
    assert code == 0, err
    texts = ["uwe a", f"uwe a{out.splitlines()[0]} uso a"]
    assert len(out.splitlines()) == 2
    for text, said in zip(texts, out.splitlines(), strict=True):
        _, continued, _ = command(run, "-p", text, *how)
        assert continued == f"{said}\n"


# Arguments after the checkpoint, and what the sentence must say.
WRONG: dict[str, tuple[list[str], str]] = {
    "no prompt": ([], r"a prompt must be given \(-p TEXT or --file FILE\), but there is none; or talk with --chat"),
    "empty prompt": (["-p", ""], "the prompt must have at least one token, but has none"),
    "too long": (
        ["-p", "word " * 100],
        r"the prompt must be shorter than the longest sequence .*\(64 tokens\), but has",
    ),
    "temperature": (["-p", "a", "--temperature", "-1"], "--temperature must be at least 0, but is -1; use 0.7"),
    "top_p": (["-p", "a", "--top-p", "0"], "--top_p must be above 0 and at most 1, but is 0"),
    "max tokens": (["-p", "a", "--max-tokens", "0"], "--max_tokens must be at least 1, but is 0; use 64"),
    "system alone": (["-p", "a", "--system", "b"], "--system must stand beside --chat"),
    "json alone": (["--chat", "--json"], "--json must stand beside a prompt"),
    "no template": (["--chat", "-p", "a"], "must have a chat template, but .* has no chat_template.jinja"),
    "device": (["-p", "a", "--device", "tpu"], "--device must be one that is here, but is tpu"),
    "file": (["--file", "nowhere.txt"], "--file must be a text that can be read, but nowhere.txt cannot"),
    "tokenizer": (
        ["-p", "a", "--tokenizer", "nowhere"],
        "data.tokenizer must be a tokenizer.json or a folder with one",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_one_sentence(command: Command, run: Path, case: str) -> None:
    arguments, sentence = WRONG[case]
    code, _, err = command(run, *arguments)
    assert code == 2
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in err
    assert re.search(sentence, lines[0]), lines


def test_what_has_no_weights_is_refused(command: Command, tmp_path: Path) -> None:
    code, _, err = command(tmp_path, "-p", "a")
    assert (code, err.count("error: ")) == (2, 1)
