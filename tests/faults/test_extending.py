"""A run that goes on beyond its first end: asked about, acted on once, bitwise wherever it is killed."""

import json
import logging
import shutil
from pathlib import Path

import pytest

from regrow.launch.config.errors import UserError
from regrow.launch.run.run_documents import begin_run
from regrow.launch.run.start import open_spec
from regrow.trainer.data.corpus import Corpus
from regrow.trainer.schedules.config import CosineConfig
from regrow.trainer.schedules.shapes import Cosine
from tests.runs import spec_of, train
from tests.support import metrics, record, tiny

pytestmark = pytest.mark.slow

SCHEDULE = ["scheduler=cosine", "scheduler.warmup_steps=2", "hooks=none", "checkpoint.interval=3"]


def rates(run_dir: Path) -> list[float]:
    return [r["lr"] / 1e-3 for r in metrics(run_dir)]


@pytest.fixture(scope="module")
def short(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six steps."""
    folder = tmp_path_factory.mktemp("short") / "run"
    train([*tiny(corpus, *SCHEDULE), "train.steps=6"], folder)
    return folder


@pytest.fixture
def run(short: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    shutil.copytree(short, tmp_path / "run")
    return tmp_path / "run"


def test_a_short_run_does_not_spoil_the_long_one(corpus: Path, run: Path) -> None:
    before = record(run)
    with pytest.raises(
        UserError, match=r"train.steps must be at most 6, .* but is 12: 6 steps .* run.extend=stretch"
    ):
        train([*tiny(corpus, *SCHEDULE), "train.steps=12"], run)
    assert record(run) == before
    # A step more is within the tolerance.
    assert train([*tiny(corpus, *SCHEDULE), "train.steps=7"], run).step == 7
    assert rates(run)[5:] == pytest.approx([0.1, 0.1])


def test_stretching_is_bitwise_wherever_it_is_killed(corpus: Path, run: Path, tmp_path: Path) -> None:
    command = [*tiny(corpus, *SCHEDULE), "train.steps=12"]
    killed = tmp_path / "killed"
    shutil.copytree(run, killed)
    train([*command, "run.extend=stretch"], run)
    whole = rates(run)
    cosine = Cosine(CosineConfig(warmup_steps=2))
    assert whole == pytest.approx([cosine.factor(s, 6 if s <= 6 else 12) for s in range(1, 13)])
    (extension,) = record(run)["extensions"]
    assert (extension["after_step"], extension["mode"], extension["total"]) == (6, "stretch", 12)
    # Killed before its first step: the answer was recorded, and need not be given again.
    spec = spec_of([*command, "run.extend=stretch"], killed, 1)
    opened = open_spec(spec)
    assert opened.reached is None
    begin_run(spec.config_dict, killed, Corpus(spec.data_folders), spec.overrides, opened.record)
    train(command, killed)
    assert [(r["loss"], r["lr"]) for r in metrics(killed)] == [(r["loss"], r["lr"]) for r in metrics(run)]
    # Killed after step 9: the same command, answer included, does not stretch again.
    shutil.rmtree(killed / "checkpoint/step-12")
    train([*command, "run.extend=stretch"], killed)
    assert [(r["loss"], r["lr"]) for r in metrics(killed)] == [(r["loss"], r["lr"]) for r in metrics(run)]
    assert record(killed)["extensions"] == [extension]
    assert train(command, killed).kind == "finished"


def test_holding_stays_at_the_floor_and_a_later_stretch_leaves_it(corpus: Path, run: Path) -> None:
    command = tiny(corpus, *SCHEDULE)
    train([*command, "train.steps=9", "run.extend=hold"], run)
    assert rates(run)[5:] == pytest.approx([0.1] * 4)
    with pytest.raises(UserError, match="train.steps must be at most 6"):
        train([*command, "train.steps=12"], run)
    train([*command, "train.steps=12", "run.extend=stretch"], run)
    assert rates(run)[9] > 0.15
    # Back to a step before both: that line of steps has been given no answer.
    with pytest.raises(UserError, match="train.steps must be at most 6"):
        train([*command, "train.steps=12", "checkpoint.load_step=3"], run)
    # A schedule that begins anew at the loaded step reaches the end by itself.
    back = ["checkpoint.load_step=3", "checkpoint.exclude_from_loading=[lr_scheduler]"]
    train([*command, "train.steps=12", *back], run)
    assert rates(run)[3:5] == pytest.approx([0.5, 1.0])
    assert rates(run)[11] == pytest.approx(0.1)


def test_starting_from_another_runs_whole_state_asks_too(corpus: Path, short: Path, tmp_path: Path) -> None:
    command = [*tiny(corpus, *SCHEDULE), "train.steps=12", f"checkpoint.initial_load_path={short}",
               "checkpoint.initial_load_model_only=false"]  # fmt: skip
    with pytest.raises(UserError, match="train.steps must be at most 6"):
        train(command, tmp_path / "new")
    train([*command, "run.extend=stretch"], tmp_path / "new")
    assert rates(tmp_path / "new")[0] > 0.3
    assert rates(tmp_path / "new")[-1] == pytest.approx(0.1)


def test_records_without_extensions_are_read(run: Path, corpus: Path) -> None:
    body = json.loads((run / "run.json").read_text())
    del body["extensions"]
    (run / "run.json").write_text(json.dumps(body))
    assert train([*tiny(corpus, *SCHEDULE), "train.steps=6"], run).kind == "finished"


def test_fewer_steps_than_reached_say_where_the_run_stands(
    corpus: Path, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert open_spec(spec_of([*tiny(corpus, *SCHEDULE), "train.steps=4"], run, 1)).reached == 6
    assert "the run is at step 6 already; train.steps=4 leaves nothing to train" in caplog.text
    assert "checkpoint.load_step=3" in caplog.text


def test_a_warm_up_that_does_not_fit_is_said_at_the_start(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    open_spec(spec_of(tiny(corpus, "train.steps=20"), tmp_path, 1))
    assert caplog.text.count("scheduler.warmup_steps (100) does not fit into a schedule of 20 steps") == 1
