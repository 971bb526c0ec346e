"""Results beside a run: each once, whoever adds them and whatever cuts a line short."""

import dataclasses
import json
import multiprocessing
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from regrow.trainer.evaluation.record import EvaluationKey, EvaluationRecord, fingerprint
from regrow.trainer.evaluation.task import Perplexity, Task

KEY = EvaluationKey(
    step=3, lineage="a", task="texts", items="0f", few_shot=0, seed=0, context=None, dtype=None
)  # fmt: skip


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_was_found_is_found_again_and_once(tmp_path: Path) -> None:
    record = EvaluationRecord(tmp_path / "evaluations.jsonl")
    assert record.find(KEY) is None
    record.add(KEY, {"ppl": 3.25, "items": 2})
    record.add(KEY, {"ppl": 4.0, "items": 2})
    assert record.find(KEY) == {"ppl": 3.25, "items": 2}
    assert len(rows(tmp_path / "evaluations.jsonl")) == 1
    for name, value in (("step", 4), ("lineage", "b"), ("items", "f0"), ("seed", 1), ("context", 8), ("few_shot", 1)):
        assert record.find(dataclasses.replace(KEY, **{name: value})) is None, name  # type: ignore[arg-type]


@given(st.data())
def test_a_line_that_a_kill_cut_short_is_gone(tmp_path_factory: object, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("cut") / "e.jsonl"  # type: ignore[attr-defined]
    record = EvaluationRecord(path)
    keys = [dataclasses.replace(KEY, step=step) for step in range(3)]
    for key in keys:
        record.add(key, {"ppl": float(key.step)})
    text = path.read_bytes()
    at = data.draw(st.integers(0, len(text)))
    path.write_bytes(text[:at])
    for key in keys:
        record.add(key, {"ppl": float(key.step)})
    assert path.read_bytes() == text


def _add(path: Path, steps: range) -> None:
    record = EvaluationRecord(path)
    for step in steps:
        record.add(dataclasses.replace(KEY, step=step), {"ppl": 1.0})


def test_several_processes_add_each_once(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=_add, args=(path, range(20))) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert sorted(row["step"] for row in rows(path)) == list(range(20))  # type: ignore[type-var]


def test_another_text_is_another_task() -> None:
    one, other = (Task(name="t", items=(Perplexity(text=text),), source="f") for text in "ab")
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one) == fingerprint(dataclasses.replace(one, source="g"))
