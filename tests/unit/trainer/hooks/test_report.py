"""When the hook writes a page, and when it leaves it to the command. Whole runs are in `tests/report/test_runs.py`."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from regrow.checkpoint.run.lease import LeaseLostError
from regrow.trainer.hooks import report
from regrow.trainer.hooks.report import ReportHook
from regrow.trainer.hooks.report_config import ReportConfig
from regrow.trainer.loop import StopReason
from tests.report.made_runs import make_sweep


@pytest.fixture
def run(tmp_path: Path) -> Path:
    make_sweep(tmp_path, runs=1, steps=50)
    return next(tmp_path.iterdir())


def trainer(run: Path, *, stop: StopReason | None = None, is_main: bool = True) -> Any:
    """What the hook looks at of one."""
    resources = SimpleNamespace(run_dir=run, run_name="r")
    return SimpleNamespace(context=SimpleNamespace(is_main=is_main), resources=resources, stop=stop)


@pytest.mark.parametrize("stop", [None, StopReason.finished, StopReason.preempted])
def test_a_run_that_ends_has_a_page(run: Path, stop: StopReason | None) -> None:
    ReportHook(ReportConfig()).after_fit(trainer(run, stop=stop))
    assert (run / "report.html").stat().st_size > 10_000


def test_other_ranks_write_none(run: Path) -> None:
    ReportHook(ReportConfig()).after_fit(trainer(run, is_main=False))
    assert not (run / "report.html").exists()


def test_a_run_that_another_has_taken_over_is_left_alone(run: Path) -> None:
    hook = ReportHook(ReportConfig())
    hook.on_exception(trainer(run), LeaseLostError("taken"))
    assert not (run / "report.html").exists()
    hook.on_exception(trainer(run), RuntimeError("broken"))
    assert (run / "report.html").exists()


def test_a_stop_does_not_wait_for_a_long_page(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_MOST_BYTES_STOPPED", 100)
    hook = ReportHook(ReportConfig())
    hook.after_fit(trainer(run, stop=StopReason.terminated))
    assert not (run / "report.html").exists()
    hook.after_fit(trainer(run))
    assert (run / "report.html").exists()
