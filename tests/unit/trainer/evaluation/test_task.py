"""Tasks are read line by line, and what is none is said with file and line."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from regrow.trainer.evaluation.harness import read_harness_task
from regrow.trainer.evaluation.task import (
    Cloze,
    Generation,
    MultipleChoice,
    Perplexity,
    Task,
    TaskError,
    find_tasks,
    read_lines,
)

READERS = {".jsonl": read_lines, ".yaml": read_harness_task}


def task(folder: Path, *lines: Any, name: str = "t.jsonl") -> Path:
    (folder / name).write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return folder / name


def test_kinds_are_told_by_their_fields(tmp_path: Path) -> None:
    task(tmp_path, {"query": "a?", "choices": [" b", " cd"], "gold": 1}, name="choices.jsonl")
    task(tmp_path, {"context": "a", "target": " b"}, {"cloze": "so it goes on "}, name="cloze.jsonl")
    task(tmp_path, {"text": "a text"}, "", {"text": "another"}, name="texts.jsonl")
    task(tmp_path, {"query": "1+1=", "answer": ["2", "two"], "regex": r"(\w+)", "stop": ["."]}, name="writes.jsonl")
    found = {t.name: t.items for t in find_tasks([str(tmp_path)], READERS)}
    assert list(found) == ["choices", "cloze", "texts", "writes"]
    assert found["choices"] == (MultipleChoice(query="a?", choices=(" b", " cd"), gold=1, lengths=(2, 3)),)
    assert found["cloze"] == (Cloze(context="a", target=" b"), Cloze(context="so it goes", target=" on"))
    assert found["texts"] == (Perplexity(text="a text"), Perplexity(text="another"))
    assert found["writes"] == (Generation(query="1+1=", answers=("2", "two"), regex=r"(\w+)", stop=(".",)),)


CHOICE = {"query": "q", "choices": ["a", "b"], "gold": 0}
WRONG: dict[str, tuple[list[Any], str]] = {
    "no JSON": ([CHOICE, "{"], r"a JSON object in each line, but line 2 of .*t.jsonl is none"),
    "a list": ([CHOICE, "[]"], r"line 2 of .*t.jsonl is list"),
    "unknown fields": ([{"question": "a"}], r"must have choices, answer, cloze, target or text, but line 1 .* only question"),
    "one choice": ([{**CHOICE, "choices": ["a"]}], r"choices must be at least two, but line 1 .* has 1"),
    "choices of numbers": ([{**CHOICE, "choices": [1, 2]}], r"choices must be a text or a list of texts, but in line 1"),
    "gold beyond": ([{**CHOICE, "gold": 2}], r"gold must be the number of a choice, from 0 to 1, but in line 1 .* is 2"),
    "gold of text": ([{**CHOICE, "gold": "a"}], r"gold must be .* is 'a'"),
    "empty target": ([{"context": "a", "target": ""}], r"target must be a text, but in line 1 .* is ''"),
    "one word": ([{"cloze": "word"}], r"cloze must have a last word after a space, but line 1"),
    "regex": ([{"query": "a", "answer": "b", "regex": "("}], r"regex must be a regular expression, but in line 1"),
    "max_tokens": ([{"query": "a", "answer": "b", "max_tokens": 0}], r"max_tokens must be at least 1, but in line 1"),
    "mixed": ([CHOICE, {"text": "a"}], r"of one kind, but line 2 of .* is not"),
    "empty": ([], r"at least one line, but .*t.jsonl has none"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_task_is_said_with_its_line(case: str, tmp_path: Path) -> None:
    lines, sentence = WRONG[case]
    with pytest.raises(TaskError) as refused:
        find_tasks([str(task(tmp_path, *lines))], READERS)
    assert re.search(sentence, str(refused.value)), refused.value


def test_files_that_are_not_there_or_the_same(tmp_path: Path) -> None:
    for place, sentence in (
        (tmp_path / "none.jsonl", "cannot (No such file or directory)"),
        (tmp_path, "tasks or folders of them, but"),
        (task(tmp_path, CHOICE, name="t.txt"), "that end in .jsonl, .yaml, but"),
    ):
        with pytest.raises(TaskError, match=re.escape(sentence)):
            find_tasks([str(place)], READERS)
    file = task(tmp_path, CHOICE)
    with pytest.raises(TaskError, match="names of their own"):
        find_tasks([str(file), str(file)], READERS)


def test_examples_are_others_by_seed_and_place(tmp_path: Path) -> None:
    lines = [{"query": f"q{n} ", "choices": ["a", "b"], "gold": n % 2} for n in range(6)]
    (found,) = find_tasks([str(task(tmp_path, *lines))], READERS)
    queries = found.queries(3, 5)
    assert queries == found.queries(3, 5) != found.queries(3, 6)
    for place, query in enumerate(queries):
        shots = query.split("\n\n")[:-1]
        assert len(set(shots)) == 3
        assert f"q{place} {'ab'[place % 2]}" not in shots
        assert set(shots) < {f"q{n} {'ab'[n % 2]}" for n in range(6)}
    assert found.queries(0, 1) == [""] * 6
    with pytest.raises(TaskError, match="below the number of a task's items, but is 6 .* has 6; use 5"):
        found.queries(6, 0)
    texts = Task(name="t", items=(Perplexity(text="a"), Perplexity(text="b")), source="t")
    with pytest.raises(TaskError, match="must be 0 for perplexity"):
        texts.queries(1, 0)


HARNESS = """
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: data.jsonl}}
test_split: test
output_type: multiple_choice
description: "Answer. "
doc_to_text: "Q: {{question}}\\nA:"
doc_to_choice: options
doc_to_target: "{{options.index(right)}}"
target_delimiter: "  "
metric_list: [{metric: acc}]
metadata: {version: 1.0}
"""


def test_tasks_of_the_harness(tmp_path: Path) -> None:
    record = {"question": "the sky?", "options": ["red", "blue"], "right": "blue"}
    task(tmp_path, record, name="data.jsonl")
    (tmp_path / "c.yaml").write_text(HARNESS)
    (found,) = find_tasks([str(tmp_path / "c.yaml")], READERS)
    assert found.name == "colours"
    assert found.items == (
        MultipleChoice(query="Answer. Q: the sky?\nA:", choices=("  red", "  blue"), gold=1, lengths=(3, 4)),
    )
    written = HARNESS.replace("multiple_choice", "generate_until").replace("doc_to_choice: options\n", "")
    written = (
        written.replace('"{{options.index(right)}}"', "right") + "generation_kwargs: {until: '.', max_gen_toks: 5}\n"
    )
    written += "filter_list: [{name: a, filter: [{function: regex, regex_pattern: '[a-z]+'}]}]\n"
    (tmp_path / "c.yaml").write_text(written)
    (found,) = find_tasks([str(tmp_path / "c.yaml")], READERS)
    query = "Answer. Q: the sky?\nA:"
    assert found.items == (Generation(query=query, answers=("blue",), regex="[a-z]+", stop=(".",), max_tokens=5),)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("task:", "process_docs: !function utils.process\ntask:"), "must be YAML without code"),
        (("task:", "process_results: a\ntask:"), "asks for process_results; run it by lm_eval itself"),
        (("dataset_path: json", "dataset_path: hellaswag"), "dataset_path must be json, .* is 'hellaswag'"),
        (("{test: data.jsonl}", "{train: data.jsonl}"), r"must have the split that is asked for \(test\)"),
        (("data.jsonl", "none.jsonl"), "must be files that are here, but none.jsonl"),
        (("multiple_choice", "other"), "output_type must be one of"),
        (("{{question}}", "{{nothing}}"), "a task's template must fit its records"),
        (("{{options.index(right)}}", "9"), "doc_to_target must be the number of a choice"),
        (("doc_to_choice: options", "doc_to_choice: right"), "doc_to_choice must be at least two choices"),
    ],
)
def test_what_the_harness_needs_code_or_data_for_is_refused(
    change: tuple[str, str], sentence: str, tmp_path: Path
) -> None:
    task(tmp_path, {"question": "the sky?", "options": ["red", "blue"], "right": "blue"}, name="data.jsonl")
    (tmp_path / "c.yaml").write_text(HARNESS.replace(*change))
    with pytest.raises(TaskError, match=sentence):
        find_tasks([str(tmp_path / "c.yaml")], READERS)
