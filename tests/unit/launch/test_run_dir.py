"""What opening a run decides, from a config and what lies in its directory."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from regrow.launch.config.errors import UserError
from regrow.launch.run.ownership import own_run
from regrow.launch.run.prepare import prepare_run
from regrow.launch.run.run_dir import OpenedRun
from regrow.launch.run.run_documents import begin_run
from regrow.launch.run.start import open_spec
from regrow.trainer.data.corpus import Corpus
from regrow.trainer.run_record import Attempt, RunRecord
from tests.support import compose_config, tiny

Open = Callable[..., OpenedRun]
BASE = ("hooks=none", "train.steps=10", "scheduler.total_steps=10", "launch.device=cpu")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The run's directory."""
    return tmp_path / "run"


@pytest.fixture
def open_it(corpus: Path, run: Path) -> Open:
    """Opens the run with a command, and begins it as rank 0 does once the state is loaded."""

    def open_it(*overrides: str, begin: bool = True) -> OpenedRun:
        spec = prepare_run(compose_config(tiny(corpus, *BASE, *overrides)), run, overrides=overrides)
        opened = open_spec(spec)
        if begin and opened.reached is None:
            begin_run(spec.config_dict, run, Corpus(spec.data_folders), spec.overrides, opened.record)
        return opened

    return open_it


def end(run: Path, **fields: object) -> None:
    """Writes into the record how the last start ended."""
    record = RunRecord.load(run)
    assert record is not None
    attempt = Attempt(lineage=record.lineages[-1].id, **fields)  # type: ignore[arg-type]
    dataclasses.replace(record, attempts=[*record.attempts, attempt]).save(run)


def test_opening_alone_writes_nothing(open_it: Open, run: Path) -> None:
    assert open_it(begin=False).reached is None
    assert list(run.iterdir()) == []


def test_the_same_command_goes_on_in_the_same_line(open_it: Open, run: Path) -> None:
    first = open_it()
    again = open_it()
    assert again.reached is None
    assert again.record.run_id == first.record.run_id
    assert [x.id for x in again.record.lineages] == [x.id for x in first.record.lineages]
    assert again.record.changes == []
    assert {p.name for p in run.iterdir()} == {".hydra", "config.yaml", "run.json", "tokenizer.json"}


def test_starting_afresh_sets_the_line_aside_and_keeps_its_rows(open_it: Open, run: Path) -> None:
    first = open_it()
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    second = open_it("run.resume=never")
    assert len(second.record.lineages) == 2
    assert second.record.run_id == first.record.run_id
    kept = run / "lineages" / first.record.lineages[-1].id / "metrics.jsonl"
    assert kept.read_text() == '{"step": 1}\n'


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["seed=1"], r"must keep its model, data and seed, but seed .* choose another run.name"),
        (["data.seq_len=16"], r"must keep its model, data and seed, but data.seq_len"),
        (
            ["optimizer.lr=0.5"],
            r"must keep its hyperparameters, but optimizer.lr .* run.allow_change=\[optimizer.lr\]",
        ),
    ],
)
def test_another_run_in_its_place_is_refused(overrides: list[str], sentence: str, open_it: Open, run: Path) -> None:
    open_it()
    before = (run / "run.json").read_bytes()
    with pytest.raises(UserError, match=sentence):
        open_it(*overrides)
    assert (run / "run.json").read_bytes() == before


def test_an_allowed_change_is_recorded_once(open_it: Open) -> None:
    open_it()
    changed = ["optimizer.lr=0.5", "run.allow_change=[optimizer.lr]"]
    assert [c["name"] for c in open_it(*changed).record.changes] == ["optimizer.lr"]
    assert len(open_it(*changed).record.changes) == 1


def test_what_must_be_there_and_is_not_is_refused(open_it: Open, run: Path) -> None:
    with pytest.raises(ValueError, match="run.resume must not be 'must' where there is nothing to resume"):
        open_it("run.resume=must")
    assert not (run / "run.json").exists()


def test_a_finished_run_has_nothing_to_do(open_it: Open, run: Path) -> None:
    open_it("checkpoint=disabled")
    end(run, end="terminated", to_step=10)
    assert open_it("checkpoint=disabled").reached is None
    end(run, end="finished", to_step=10)
    assert open_it("checkpoint=disabled").reached == 10
    # With checkpoints, only a step that was kept counts.
    assert open_it("checkpoint=pinned").reached is None


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda run: (run / "config.yaml").unlink(), r"must have its config.yaml to be continued, but has not"),
        (lambda run: (run / "config.yaml").write_text("{"), r"config.yaml must be the run's config, but cannot be"),
        (lambda run: (run / "config.yaml").write_text("a: 1"), r"config.yaml must be the run's config, but holds none"),
        (lambda run: (run / "run.json").write_text("{"), r"run.json"),
        (lambda run: ((run / "run.json").unlink(), (run / "metrics.jsonl").write_text('{"step": 1}\n')),
         r"run.name must not name a run whose run.json is gone"),
    ],
)  # fmt: skip
def test_damage_is_refused_in_one_sentence(
    damage: Callable[[Path], object], sentence: str, open_it: Open, run: Path
) -> None:
    open_it()
    damage(run)
    with pytest.raises(ValueError, match=sentence) as refused:
        open_it()
    assert "\n" not in str(refused.value)


def test_a_restart_of_the_same_launch_does_not_start_afresh_again(
    open_it: Open, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_it()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert len(open_it("run.resume=never", begin=False).record.lineages) == 2
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    # The ranks had not loaded: the choice is not recorded yet, and is made again.
    assert len(open_it("run.resume=never").record.lineages) == 2
    assert len(open_it("run.resume=never").record.lineages) == 2
    assert json.loads((run / "run.json").read_text())["lineages"][-1]["id"].startswith("1-")


def test_a_refused_run_leaves_no_folder(corpus: Path, tmp_path: Path) -> None:
    config = prepare_run(compose_config(tiny(corpus, *BASE)), tmp_path / "run").config
    with own_run(config, tmp_path / "run"):
        assert (tmp_path / "run" / config.checkpoint.folder).is_dir()
    assert not (tmp_path / "run").exists()
