"""Evaluation while a run trains: the same numbers under every layout and beside the run, once, whatever ends it."""

import dataclasses
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from regrow.launch.commands.evaluate_model import evaluate
from regrow.launch.commands.loaded_model import open_on
from regrow.launch.run.rank import run_rank
from regrow.launch.run.rank_spec import RankSpec
from regrow.launch.run.signals import StopFlag
from regrow.launch.run.start import open_spec
from regrow.trainer.evaluation.harness import READERS
from regrow.trainer.evaluation.in_run import RunningModel
from regrow.trainer.evaluation.task import find_tasks
from tests.distributed.test_parallel import base, degrees
from tests.layouts import relative
from tests.pool import run_distributed
from tests.runs import spec_of, train
from tests.support import assert_same_tensors, curve, metrics, record

pytestmark = pytest.mark.slow

TASKS: dict[str, list[dict[str, Any]]] = {
    "choices": [
        {"query": f"{first} {second}", "choices": [" abc de", " fgh", " i jkl mno p"], "gold": n % 3}
        for n, (first, second) in enumerate(zip("abcdefghij", "klmnopqrst", strict=True))
    ],
    "last_words": [{"cloze": f"{'word ' * n}and then {c}{c}"} for n, c in enumerate("abcdefg")],
    "texts": [{"text": "abc def ghi jkl " * n} for n in (1, 2, 9)],
    "answers": [{"query": "abc", "answer": "def", "max_tokens": 4}, {"query": "x", "answer": "y", "max_tokens": 3}],
}
METRICS = [
    "eval/choices/acc", "eval/choices/acc_norm", "eval/last_words/acc", "eval/last_words/ppl", "eval/texts/ppl",
    "eval/texts/bits_per_byte", "eval/answers/exact_match",
]  # fmt: skip


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, lines in TASKS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def evaluated(tasks: Path, *more: str) -> list[str]:
    return ["hooks=none", "+hook@hooks.evaluation=evaluation", f"hooks.evaluation.tasks=[{tasks}]",
            "hooks.evaluation.every=2", *more]  # fmt: skip


def results(run_dir: Path) -> dict[int, dict[str, float]]:
    """By step, without the time that it took."""
    rows = {r["step"]: {n: v for n, v in r.items() if n.startswith("eval/")} for r in metrics(run_dir)}
    return {step: found for step, found in rows.items() if found}


LAYOUTS = {
    "dense": [(2, "dp_shard=2"), (2, "tp=2"), (2, "pp=2"), (2, "cp=2"),
              (4, "tp=2 pp=2")],
    "moe": [(2, "dp_shard=2 ep=2"), (2, "tp=2 ep=2")],
}  # fmt: skip


@pytest.mark.parametrize("kind", list(LAYOUTS))
def test_every_layout_and_the_command_find_the_same(corpus: Path, tmp_path: Path, tasks: Path, kind: str) -> None:
    settings = [*base(corpus, kind, "precision=fp64", "train.steps=3", "model.n_layers=2"), *evaluated(tasks),
                "checkpoint=debug"]  # fmt: skip
    assert train(settings, tmp_path / "one").kind == "finished"
    expected = results(tmp_path / "one")
    assert list(expected) == [2, 3]
    assert all(sorted(row) == sorted(METRICS) for row in expected.values())
    assert all(row["eval_time_s"] > 0 for row in metrics(tmp_path / "one") if row["step"] > 1)
    for world, layout in LAYOUTS[kind]:
        run_dir = tmp_path / layout
        assert train([*settings, *degrees(layout), "checkpoint=disabled"], run_dir, world).kind == "finished"
        for step, row in results(run_dir).items():
            for name in METRICS:
                assert relative(row[name], expected[step][name]) <= 1e-9, (layout, step, name)
    loaded = open_on(str(tmp_path / "one"), device="cpu", dtype=None, tokenizer=None)
    beside = evaluate(loaded, find_tasks([str(tasks)], READERS), context=32)
    for name, value in expected[3].items():
        _, task, metric = name.split("/")
        assert relative(beside[task][metric], value) <= 1e-9, name


@pytest.mark.parametrize("kind", list(LAYOUTS))
def test_in_float32_every_layout_finds_what_one_rank_does(
    corpus: Path, tmp_path: Path, tasks: Path, kind: str
) -> None:
    """The same weights everywhere: they are loaded, and the step changes nothing but the experts' biases."""
    settings = [*base(corpus, kind, "precision=fp32", "model.n_layers=2"), "checkpoint=debug"]
    assert train([*settings, "train.steps=6", "hooks=none"], tmp_path / "one").kind == "finished"
    start = [f"checkpoint.initial_load_path={tmp_path / 'one'}", "train.steps=1", "optimizer.lr=1e-30"]
    assert train([*settings, *evaluated(tasks), *start], tmp_path / "again").kind == "finished"
    expected = results(tmp_path / "again")[1]
    loaded = open_on(str(tmp_path / "again"), device="cpu", dtype=None, tokenizer=None)
    beside = evaluate(loaded, find_tasks([str(tasks)], READERS), context=32)
    for world, layout in LAYOUTS[kind]:
        run_dir = tmp_path / layout
        given = [*settings, *evaluated(tasks), *start, *degrees(layout)]
        assert train(given, run_dir, world).kind == "finished"
        found = results(run_dir)[1]
        for name in METRICS:
            _, task, metric = name.split("/")
            limit = 1e-5 if metric in ("ppl", "bits_per_byte") else 0.0
            assert relative(found[name], expected[name]) <= limit, (layout, name)
            assert relative(beside[task][metric], expected[name]) <= limit, name


def _with_scores(spec: RankSpec, told: Callable[[int, StopFlag], None]) -> Any:
    """Trains, and tells of each set of rows that is scored, before it is."""
    flag, scored, count = StopFlag(), RunningModel.score, 0

    def score(self: RunningModel, rows: Any) -> Any:
        nonlocal count
        count += 1
        told(count, flag)
        return scored(self, rows)

    setattr(RunningModel, "score", score)  # noqa: B010
    return run_rank(spec, flag)


def _kill(spec: RankSpec) -> Any:
    def told(count: int, _flag: StopFlag) -> None:
        if count == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    return _with_scores(spec, told)


def _stop(spec: RankSpec) -> Any:
    def told(count: int, flag: StopFlag) -> None:
        if count == 2 and os.environ["RANK"] == "1":
            flag.received = signal.SIGTERM

    return _with_scores(spec, told)


def _opened(settings: list[str], run_dir: Path) -> RankSpec:
    run_dir.mkdir(parents=True, exist_ok=True)
    spec = spec_of(settings, run_dir, 2)
    return dataclasses.replace(spec, record=open_spec(spec).record)


def test_killed_while_it_evaluates(corpus: Path, tmp_path: Path, tasks: Path) -> None:
    """In the second evaluation: curves, results and weights are those of a run that nobody disturbed."""
    settings = [*base(corpus, "dense", "train.steps=6", "parallel.dp_shard=2"), *evaluated(tasks), "checkpoint=debug",
                "checkpoint.interval=3"]  # fmt: skip
    train(settings, tmp_path / "whole", 2)
    with pytest.raises(AssertionError, match="exit code -9"):
        run_distributed(_kill, _opened(settings, tmp_path / "cut"), world_size=2)
    assert train(settings, tmp_path / "cut", 2).kind == "finished"
    assert [a["from_step"] for a in record(tmp_path / "cut")["attempts"]] == [0, 3]
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert list(results(tmp_path / "cut")) == [2, 4, 6]
    assert results(tmp_path / "cut") == results(tmp_path / "whole")
    assert_same_tensors(tmp_path / "cut/checkpoint/step-6", tmp_path / "whole/checkpoint/step-6")


def test_killed_while_it_evaluates_and_continued_on_one_rank(corpus: Path, tmp_path: Path, tasks: Path) -> None:
    settings = [*base(corpus, "dense", "precision=fp64", "train.steps=6"), *evaluated(tasks), "checkpoint=debug",
                "checkpoint.interval=3"]  # fmt: skip
    train(settings, tmp_path / "whole")
    with pytest.raises(AssertionError, match="exit code -9"):
        run_distributed(_kill, _opened([*settings, "parallel.dp_shard=2"], tmp_path / "cut"), world_size=2)
    assert train(settings, tmp_path / "cut").kind == "finished"
    found, expected = results(tmp_path / "cut"), results(tmp_path / "whole")
    assert list(found) == list(expected) == [2, 4, 6]
    assert all(relative(found[step][n], expected[step][n]) <= 1e-9 for step in expected for n in METRICS)


def test_stopped_while_it_evaluates_and_the_best_step_stays(corpus: Path, tmp_path: Path, tasks: Path) -> None:
    """The step at which the stop came is the best, and is measured by the start after; retention knows of it."""
    best = ["+retention_rule@checkpoint.retention_rules.best=best", "checkpoint.keep_latest_k=2",
            "checkpoint.retention_rules.best.best.metric=eval/texts/ppl",
            "checkpoint.retention_rules.best.best.lower_is_better=false"]  # fmt: skip
    settings = [*base(corpus, "dense", "train.steps=10", "parallel.dp_shard=2"), *evaluated(tasks), "checkpoint=debug",
                "checkpoint.interval=2", *best]  # fmt: skip
    train(settings, tmp_path / "whole", 2)
    outcomes = run_distributed(_stop, _opened(settings, tmp_path / "cut"), world_size=2)
    assert (outcomes[0].kind, outcomes[0].step) == ("terminated", 2)
    assert results(tmp_path / "cut") == {}
    assert train(settings, tmp_path / "cut", 2).kind == "finished"
    assert results(tmp_path / "cut") == results(tmp_path / "whole")
    ppl = {step: row["eval/texts/ppl"] for step, row in results(tmp_path / "cut").items()}
    assert max(ppl, key=lambda step: ppl[step]) == 2
    for run in ("whole", "cut"):
        kept = sorted(int(p.name[5:]) for p in (tmp_path / run / "checkpoint").glob("step-*"))
        assert kept == [2, 8, 10], run
    assert json.loads((tmp_path / "cut/checkpoint/step-2/measured.json").read_text()).keys() >= set(METRICS)
    left, right = (json.loads((tmp_path / run / "checkpoint/step-10/manifest.json").read_text())["train_state"]
                   for run in ("whole", "cut"))  # fmt: skip
    assert left == right
