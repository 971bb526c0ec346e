"""Commands that ask a model on several ranks, which hold it together, share out what is asked, or both: the same found."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from regrow.launch.commands.command_ranks import CommandRanks
from regrow.launch.commands.loaded_model import open_model
from regrow.trainer.parallel.context import close_parallel, open_parallel
from regrow.trainer.parallel.layout import Layout
from tests.distributed.test_parallel import base
from tests.pool import run_distributed
from tests.runs import train
from tests.support import record, wait_until
from tests.warm import regrow, start

pytestmark = pytest.mark.slow

PROMPTS = [[5, 6, 7, 8, 9], [11], [3, 4], [200, 100, 50, 25, 12, 6, 3]]
KINDS = {"dense": (), "tied": ("model.tied_embeddings=true",), "moe": (), "odd": ("model.vocab_size=321",)}


@pytest.fixture(scope="module", params=KINDS)
def run_dir(request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "run"
    kind = "moe" if request.param == "moe" else "dense"
    more = ["precision=fp64", "train.steps=6", "optimizer.lr=0.02", "hooks=none", *KINDS[request.param]]
    assert train([*base(corpus, kind, *more), "checkpoint=debug"], folder).kind == "finished"
    return folder


def _ask(place: str, tp: int, world: int, dtype: torch.dtype) -> Any:
    context = open_parallel(Layout(dp_shard=world // tp, tp=tp), "cpu", 60.0)
    loaded = open_model(place, dtype=dtype, ranks=CommandRanks(context=context))
    made = loaded.model.generate(PROMPTS, max_tokens=20, temperature=0, logprobs=2)
    drawn = loaded.model.generate(PROMPTS, max_tokens=20, temperature=1.0, seed=3)
    held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in loaded.model.parameters())
    close_parallel()
    return [c.ids for c in made], [c.logprobs for c in made], [c.ids for c in drawn], held


@pytest.mark.parametrize("tp", [2, 4])
def test_a_model_that_ranks_hold_together_writes_what_it_writes_alone(run_dir: Path, tp: int) -> None:
    alone = open_model(run_dir).model
    made = alone.generate(PROMPTS, max_tokens=20, temperature=0, logprobs=2)
    drawn = alone.generate(PROMPTS, max_tokens=20, temperature=1.0, seed=3)
    whole = sum(p.numel() for p in alone.parameters())
    for ids, logprobs, drawn_ids, held in run_distributed(_ask, str(run_dir), tp, tp, torch.float64, world_size=tp):
        assert ids == [c.ids for c in made]
        assert drawn_ids == [c.ids for c in drawn]
        for of_rank, of_one in zip(logprobs, [c.logprobs for c in made], strict=True):
            assert of_rank == pytest.approx(of_one, rel=1e-12)
        # What is not shared is norms, and key heads that are fewer than ranks.
        assert held < whole * (1.25 / tp if tp == 2 else 0.5)


def test_in_float32_the_likeliest_tokens_are_the_same_where_they_lead(run_dir: Path) -> None:
    alone = open_model(run_dir, dtype=torch.float32).model
    made = alone.generate(PROMPTS, max_tokens=20, temperature=0, logprobs=2)
    (ids, *_), _ = run_distributed(_ask, str(run_dir), 2, 2, torch.float32, world_size=2)
    for of_ranks, of_one in zip(ids, made, strict=True):
        for one, other, places in zip(of_ranks, of_one.ids, of_one.alternatives, strict=True):
            if places[0][1] - places[1][1] <= 1e-4:
                break
            assert one == other


def tasks(folder: Path) -> Path:
    folder.mkdir()
    lines: dict[str, list[dict[str, Any]]] = {
        "choices": [{"query": f"{a} {b}", "choices": [" abc de", " fgh"], "gold": n % 2}
                    for n, (a, b) in enumerate(zip("abcdefg", "klmnopq", strict=True))],
        "texts": [{"text": "abc def ghi " * n} for n in (1, 2, 9)],
        "answers": [{"query": "abc", "answer": "def", "max_tokens": 4}, {"query": "x", "answer": "y", "max_tokens": 3}],
    }  # fmt: skip
    for name, of_task in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in of_task))
    return folder


EVALUATE, GENERATE = "regrow.launch.commands.evaluate", "regrow.launch.commands.generate"


@pytest.fixture(scope="module")
def dense(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands") / "outputs" / "r"
    settings = [*base(corpus, "dense", "train.steps=4", "hooks=none"), "checkpoint=debug", "checkpoint.interval=2"]
    assert train([*settings, "checkpoint.keep_latest_k=0"], folder).kind == "finished"
    return folder


@pytest.mark.parametrize("ranks", [["--ranks=3"], ["--tp=2"], ["--ranks=4", "--tp=2"]], ids=" ".join)
def test_regrow_eval_finds_the_same_on_any_number_of_ranks(dense: Path, tmp_path: Path, ranks: list[str]) -> None:
    asked = ["--tasks", str(tasks(tmp_path / "tasks")), "--json", "--dtype=float64", "--device=cpu"]
    steps = sorted((dense / "checkpoint").glob("step-*"))
    code, alone = regrow([str(steps[0]), *asked], tmp_path, module=EVALUATE)
    assert code == 0, alone
    (dense / "evaluations.jsonl").unlink()
    code, out = regrow([str(steps[0]), *asked, *ranks], tmp_path, module=EVALUATE)
    assert code == 0, out
    found, expected = json.loads(out), json.loads(alone)
    assert found.keys() == expected.keys()
    for task, metrics in expected.items():
        assert found[task] == pytest.approx(metrics, rel=1e-9)
    # Written once, and found again without a model.
    assert len((dense / "evaluations.jsonl").read_text().splitlines()) == 3
    (dense / "evaluations.jsonl").unlink()


def test_killed_on_two_ranks_and_given_again_on_three_each_result_comes_once(dense: Path, tmp_path: Path) -> None:
    step = min((dense / "checkpoint").glob("step-*"))
    asked = [str(step), "--tasks", str(tasks(tmp_path / "tasks")), "--json", "--dtype=float64", "--device=cpu"]
    kept = dense / "evaluations.jsonl"
    command = start([*asked, "--ranks=2"], tmp_path, EVALUATE)
    wait_until(kept.exists, 60.0)
    os.kill(command.pid, signal.SIGKILL)
    command.wait(10.0)
    code, out = regrow([*asked, "--ranks=3"], tmp_path, module=EVALUATE)
    assert code == 0, out
    assert len(kept.read_text().splitlines()) == 3
    kept.unlink()
    code, alone = regrow(asked, tmp_path, module=EVALUATE)
    assert code == 0, alone
    for task, metrics in json.loads(alone).items():
        assert json.loads(out)[task] == pytest.approx(metrics, rel=1e-9)
    kept.unlink()


def test_a_run_is_followed_on_two_ranks(dense: Path, tmp_path: Path) -> None:
    assert record(dense)["attempts"][-1]["end"] == "finished"
    asked = ["--tasks", str(tasks(tmp_path / "tasks")), "--device=cpu", "--watch"]
    code, out = regrow([str(dense), *asked, "--ranks=2"], tmp_path, module=EVALUATE)
    assert code == 0, out
    assert [json.loads(line)["step"] for line in out.splitlines() if line.startswith("{")] == [1, 2, 4]
    (dense / "evaluations.jsonl").unlink()


def test_regrow_generate_writes_the_same_on_any_number_of_ranks(dense: Path, tmp_path: Path) -> None:
    asked = [str(dense), "--json", "--max-tokens=8", "--temperature=0", "--dtype=float64", "--device=cpu"]
    prompts = [f"-p{text}" for text in ("abc", "de fgh", "k")]
    code, alone = regrow([*asked, *prompts], tmp_path, module=GENERATE)
    assert code == 0, alone
    for ranks in (["--tp=2"], ["--ranks=2"]):
        code, out = regrow([*asked, *prompts, *ranks], tmp_path, module=GENERATE)
        assert code == 0, out
        assert json.loads(out) == json.loads(alone)


def test_ranks_end_with_the_command_that_started_them(dense: Path, tmp_path: Path) -> None:
    asked = [str(dense), "-pabc", "--max-tokens=100000", "--temperature=0", "--device=cpu", "--tp=2"]
    command = start(asked, tmp_path, GENERATE)
    ranks: list[psutil.Process] = []

    def are_there() -> bool:
        ranks[:] = [p for p in psutil.Process(command.pid).children() if GENERATE in p.cmdline()]
        return len(ranks) == 2 and all(p.num_threads() > 1 for p in ranks)

    wait_until(are_there, 60.0, 0.05)
    os.kill(command.pid, signal.SIGKILL)
    wait_until(lambda: not any(p.is_running() for p in ranks), 10.0, 0.05)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--tp=3"], "--tp must divide the model's heads"),
        (["--tp=0"], "--tp must be at least 1, but is 0; use 1"),
        (["--ranks=3", "--tp=2"], r"--tp must divide the ranks (3), but is 2; use 1 or 3"),
        (["--ranks=2", "--device=cuda:1"], "--device must be cpu, cuda or auto with several ranks, but is cuda:1"),
        (["--ranks=2", "--dtype=float32", "--tokenizer=nowhere"], "nowhere"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_what_cannot_be_is_one_sentence(dense: Path, tmp_path: Path, options: list[str], sentence: str) -> None:
    given = options if any(o.startswith("--device") for o in options) else [*options, "--device=cpu"]
    code, out = regrow([str(dense), "-pabc", *given], tmp_path, module=GENERATE)
    assert code == 2, out
    (line,) = [x for x in out.splitlines() if x.startswith("error: ")]
    assert sentence in line
    assert out.splitlines()[-1] == line
