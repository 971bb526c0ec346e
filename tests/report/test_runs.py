"""Pages of real runs and sweeps: written when they end, and right about kills, layouts and snapshots."""

import json
from pathlib import Path
from typing import Any

import pytest

import regrow
from regrow.trainer.report.read import RunReport, read_run
from regrow.trainer.report.write import write_report
from tests.report.chromium import open_browser
from tests.support import metrics, tiny, wait_until
from tests.unit.trainer.report.test_page import data_of
from tests.warm import regrow as command
from tests.warm import start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SAVES = ["checkpoint=debug", "checkpoint.interval=5", "checkpoint.keep_latest_k=2"]
FSDP = ["parallel=fsdp", "parallel.dp_shard=2"]


def page_of(folder: Path) -> dict[str, Any]:
    return data_of((folder / "report.html").read_text())


@pytest.fixture(scope="module")
def killed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed on one rank, ended on two, and went back to an earlier step."""
    folder = tmp_path_factory.mktemp("killed")
    run = [*tiny(corpus, *SAVES, "hooks.sample.enabled=false", "train.log_every=1", "run.name=r", "train.steps=40")]
    first = start([*run, "+hook@hooks.slow=throttle", "hooks.slow.seconds=0.05"], folder)
    wait_until(lambda: len(metrics(folder / "outputs/r")) >= 18)
    first.kill()
    first.wait(30)
    code, out = command([*run, *FSDP], folder)
    assert code == 0, out
    code, out = command([*run, "checkpoint.load_step=35"], folder)
    assert code == 0, out
    return folder / "outputs/r"


def test_a_killed_run_tells_its_life(killed: Path) -> None:
    run = read_run(killed, "r")
    assert isinstance(run, RunReport)
    assert run.status == "finished"
    assert run.life is not None
    first, second, third = run.life.starts
    assert (first.how, second.how, third.how) == ("killed", "finished", "finished")
    assert (first.layout, second.layout, third.layout) == ("one rank", "dp_shard 2", "one rank")
    # The log tells of steps that the record, written with the last save, does not.
    assert first.to_step >= 17 > first.saved_step >= 10
    assert (second.from_step, second.to_step) == (first.saved_step, 40)
    assert (third.from_step, third.to_step) == (35, 40)
    assert run.life.lost.again_steps == first.to_step - first.saved_step
    assert run.life.lost.down_s > 0
    assert second.began > first.ended > first.began

    states = {(s.start, s.step): s for s in run.life.snapshots}
    assert states[0, first.saved_step].resumed == 1
    assert states[0, 5].state == "pruned"
    assert states[0, 5].staged <= states[0, 5].committed <= states[0, 5].pruned
    assert states[1, 35].resumed == 1
    assert states[1, 40].state == "set aside"
    assert states[2, 40].state == "kept"
    on_disk = {int(p.name.removeprefix("step-")) for p in (killed / "checkpoint").glob("step-*")}
    assert {s.step for s in run.life.snapshots if s.state == "kept"} == on_disk
    before, now = run.life.lineages
    assert (now["parent"], now["step"], now["asked"], now["current"]) == (before["id"], 35, "load_step=35", True)


def test_a_run_that_ends_has_a_page_with_its_numbers(killed: Path) -> None:
    (run,) = page_of(killed)["runs"]
    table = regrow.read_metrics(killed).to_pylist()
    assert run["curves"]["loss"][1] == pytest.approx([row["loss"] for row in table], rel=5e-6)
    assert run["last"]["val_loss"] == next(row["val_loss"] for row in reversed(table) if row["val_loss"] is not None)
    # Made once the record said how the run ended, and after its last save.
    assert run["life"]["starts"][-1]["how"] == "finished"
    assert run["life"]["starts"][-1]["saved_step"] == 40


def test_its_page_in_chromium(killed: Path, tmp_path: Path) -> None:
    write_report([(killed, "r")], tmp_path / "page.html", "r")
    (tmp_path / "profile").mkdir()
    with open_browser(tmp_path / "profile") as browser:
        tab = browser.open(tmp_path / "page.html")
        (detail,) = tab.texts(".detail")
        for words in (
            "killed",
            "dp_shard 2 (2 ranks), start 2",
            "1: dp_shard 1",
            "goes on from step 35",
            "trained a second time",
        ):
            assert words in detail
        assert len(tab.texts("[data-chart=staircase] .start")) == 3
        assert tab.complaints() == []


def test_a_failed_run_has_a_page_too(corpus: Path, tmp_path: Path) -> None:
    bad = ["train.steps=12", "scheduler.warmup_steps=0", "train.grad_clip=0", "optimizer.lr=1e30", "run.name=r"]
    code, out = command(tiny(corpus, "hooks=none", "+hook@hooks.report=report", *bad), tmp_path)
    assert code == 1, out
    (run,) = page_of(tmp_path / "outputs/r")["runs"]
    assert run["life"]["starts"][0]["how"] == "failed"
    assert "the loss of step" in run["life"]["starts"][0]["error"]


def test_a_page_that_cannot_be_written_ends_no_run(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "outputs/r/report.html").mkdir(parents=True)
    code, out = command(
        tiny(corpus, "hooks=none", "+hook@hooks.report=report", "train.steps=2", "run.name=r"), tmp_path
    )
    assert code == 0, out
    assert "the run's report was not made" in out


@pytest.mark.parametrize("launcher", [[], ["hydra/launcher=local"]], ids=["here", "local"])
def test_a_sweep_that_ends_has_a_page(corpus: Path, tmp_path: Path, launcher: list[str]) -> None:
    sweep = tiny(corpus, "hooks=none", "train.steps=3", "run.root=outputs/s")
    code, out = command([*sweep, "-m", "optimizer.lr=1e-3,3e-4", *launcher], tmp_path)
    assert code == 0, out
    page = page_of(tmp_path / "outputs/s")
    assert page["fields"] == ["optimizer.lr"]
    assert sorted(run["fields"]["optimizer.lr"] for run in page["runs"]) == [3e-4, 1e-3]
    # Hydra tells of a page that could not be made by a warning alone.
    assert "report of 2 runs" in out
    assert json.dumps(page).count("finished") >= 2
