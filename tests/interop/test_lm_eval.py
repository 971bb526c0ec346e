"""lm_eval asks its own Hugging Face backend, and ours, of the same folder; `regrow-eval` reads the same tasks."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

from regrow.launch.commands import evaluate
from regrow.trainer.data.tokenizer import END_OF_TEXT, load_tokenizer
from tests.interop.hf_models import make
from tests.runs import train
from tests.support import ONE_THREAD

# What lm_eval and what it imports warn of is theirs.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore")]

CONTEXT = 64
KINDS: dict[str, str] = {
    "choices": "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: options\ndoc_to_target: right\n"
    "metric_list: [{metric: acc}, {metric: acc_norm}]\n",
    "delimited": "output_type: multiple_choice\ndoc_to_text: 'Q {{q}}'\ndoc_to_choice: options\n"
    "doc_to_target: right\ntarget_delimiter: ' so '\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n",
    "last_word": "output_type: loglikelihood\ndoc_to_text: \"{{t.rsplit(' ', 1)[0]}}\"\n"
    "doc_to_target: \"{{' ' + t.rsplit(' ', 1)[1]}}\"\nmetric_list: [{metric: acc}, {metric: perplexity}]\n",
    "pages": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{t}}'\n"
    "metric_list: [{metric: bits_per_byte}, {metric: byte_perplexity}]\n",
    "answers": "output_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
    "generation_kwargs: {until: ['.'], max_gen_toks: 8, do_sample: false}\n"
    "filter_list: [{name: get, filter: [{function: regex, regex_pattern: '([a-z]{2})'}, {function: take_first}]}]\n"
    "metric_list: [{metric: exact_match}]\n",
}
# Ours, and lm_eval's.
SAME = {
    ("choices", "acc"): "acc,none", ("choices", "acc_norm"): "acc_norm,none", ("delimited", "acc"): "acc,none",
    ("delimited", "acc_norm"): "acc_norm,none", ("last_word", "acc"): "acc,none",
    ("last_word", "ppl"): "perplexity,none", ("pages", "bits_per_byte"): "bits_per_byte,none",
    ("answers", "exact_match"): "exact_match,get",
}  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """A folder in Hugging Face's format, tasks, and what lm_eval makes of them by its own backend."""

    folder: Path
    tasks: Path
    theirs: dict[str, dict[str, Any]]


def _words(rng: random.Random, words: list[str], count: int) -> str:
    return " ".join(rng.choices(words, k=count))


@pytest.fixture(scope="module")
def asked(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Asked:
    folder, tasks = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("tasks")
    make("llama3", folder / "start", max_position_embeddings=CONTEXT)
    train([
        "model=from_hf", f"model.path={folder / 'start'}", "data=text", f"data.files=[{corpus}]",
        "data.tokenizer_vocab_size=300", "data.seq_len=32", "data.global_batch_size=16", "data.micro_batch_size=16",
        "train.steps=60", "optimizer.lr=1e-2", "scheduler.warmup_steps=5", "hooks=none", *ONE_THREAD,
        "checkpoint.interval=1000", "checkpoint.last_save_in_hf=true",
    ], folder / "run")  # fmt: skip
    export, tokenizer = folder / "run/export/step-60", load_tokenizer(folder / "run/tokenizer.json")
    rng, words = random.Random(3), sorted({w for line in corpus.open() for w in json.loads(line)["text"].split()})
    rows = [
        {"q": _words(rng, words, 6), "options": [_words(rng, words, n) for n in (1, 2, 3)], "right": rng.randrange(3),
         "t": _words(rng, words, rng.choice([3, 9, 60])), "a": rng.choice(words)[:2]} for _ in range(24)
    ]  # fmt: skip
    (tasks / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, body in KINDS.items():
        data = f"dataset_kwargs: {{data_files: {{test: {tasks / 'rows.jsonl'}}}}}\n"
        (tasks / f"{name}.yaml").write_text(f"task: {name}\ndataset_path: json\ntest_split: test\n{data}{body}")
    (prefix,) = tokenizer.encode(END_OF_TEXT).ids
    options = {"pretrained": str(export), "dtype": "float64", "prefix_token_id": prefix, "add_bos_token": False,
               "tokenizer": str(export), "max_length": CONTEXT}  # fmt: skip
    found = lm_eval.simple_evaluate(
        "hf", model_args=options, tasks=list(KINDS), task_manager=TaskManager(include_path=str(tasks), include_defaults=False), device="cpu",
        batch_size=8, bootstrap_iters=0, log_samples=False,
    )  # fmt: skip
    return Asked(export, tasks, found["results"])


def _ours(
    asked: Asked, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *more: str
) -> dict[str, dict[str, float]]:
    arguments = [str(asked.folder), *more, "--json", "--dtype", "float64", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["regrow-eval", *arguments])
    with pytest.raises(SystemExit) as ended:
        evaluate.main()
    out, err = capsys.readouterr()
    assert ended.value.code == 0, err
    found: dict[str, dict[str, float]] = json.loads(out.splitlines()[-1])
    return found


def _same(found: float, expected: float) -> bool:
    return abs(found - expected) <= 1e-5 * abs(expected)


def test_regrow_eval_finds_the_same(
    asked: Asked, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _ours(asked, monkeypatch, capsys, "--tasks", *(str(asked.tasks / f"{name}.yaml") for name in KINDS))
    for (task, metric), theirs in SAME.items():
        assert _same(found[task][metric], asked.theirs[task][theirs]), (task, metric)
    assert 0 < found["last_word"]["acc"] < 1 or 0 < found["choices"]["acc"] < 1, "nothing is told apart"


def test_lm_eval_asks_ours_and_finds_the_same(
    asked: Asked, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _ours(asked, monkeypatch, capsys, "--harness", *KINDS, "--harness-tasks", str(asked.tasks))
    for (task, _), theirs in SAME.items():
        assert _same(found[task][theirs.removesuffix(",none")], asked.theirs[task][theirs]), (task, theirs)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--harness", "no_such_task"], "error: --harness must name tasks of lm_eval, but no_such_task is none"),
        (["--harness", "choices", "--harness-tasks", "nowhere"], "error: --harness-tasks must be a folder of tasks"),
        (["--harness", "choices", "--watch"], "error: --harness must be given without --watch"),
        ([], "error: --tasks must name files of tasks, but is not given"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(
    asked: Asked, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: list[str], sentence: str
) -> None:
    monkeypatch.setattr("sys.argv", ["regrow-eval", str(asked.folder), *more])
    with pytest.raises(SystemExit) as ended:
        evaluate.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(sentence)
