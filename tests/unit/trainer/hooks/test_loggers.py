"""The parts of loggers: which run they write to, what they refuse, and what a kill leaves in their files."""

import csv
import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from regrow.checkpoint.documents import DocumentError
from regrow.checkpoint.policy.lineage import Lineage, StartKind
from regrow.launch.config.identity import config_hash
from regrow.launch.run.hook_order import hook_order
from regrow.trainer.config import WandbConfig
from regrow.trainer.hooks.config import WandbHookConfig
from regrow.trainer.hooks.csv import CsvHook
from regrow.trainer.hooks.log_records import read_log_records
from regrow.trainer.hooks.logger import LoggedRun, LoggerHook, Store
from regrow.trainer.hooks.logger_config import (
    CsvConfig,
    CsvHookConfig,
    MlflowConfig,
    MlflowHookConfig,
    TensorBoardConfig,
    TensorBoardHookConfig,
    TrackioConfig,
    TrackioHookConfig,
)
from regrow.trainer.hooks.logger_line import LoggerLine, begin_line, needs_child, read_line, write_line
from regrow.trainer.hooks.mlflow import MlflowHook
from regrow.trainer.hooks.tensorboard import TensorBoardHook
from regrow.trainer.hooks.trackio import TrackioHook
from regrow.trainer.hooks.user_project import read_user_project
from regrow.trainer.hooks.wandb import WandbHook
from regrow.trainer.jsonlines import RowTail, StepLog
from regrow.trainer.run_record import RunRecord
from tests.support import settings_of, typed_config

ALL = ["wandb", "tensorboard", "csv", "mlflow", "trackio"]


def opened(name: str, run_dir: Path, line: LoggerLine | None = None, folder: str | None = None) -> Store:
    """A store as a start opens it; of Trackio a process has one folder."""
    run = LoggedRun(
        run_dir=run_dir,
        run_name="a",
        run_id="abcd1234",
        sweep=None,
        config={"model": {"dim": 32, "name": "x"}},
        line=line or LoggerLine(lineage="0-aaaa"),
    )
    return hook_of(name, folder).open_store(run)


def hook_of(name: str, folder: str | None = None) -> LoggerHook:
    """The logger by itself."""
    hooks: dict[str, Callable[[], LoggerHook]] = {
        "wandb": lambda: WandbHook(WandbHookConfig(settings=WandbConfig())),
        "csv": lambda: CsvHook(CsvHookConfig(settings=CsvConfig(folder=folder))),
        "tensorboard": lambda: TensorBoardHook(TensorBoardHookConfig(settings=TensorBoardConfig(folder=folder))),
        "mlflow": lambda: MlflowHook(MlflowHookConfig(settings=MlflowConfig())),
        "trackio": lambda: TrackioHook(TrackioHookConfig(settings=TrackioConfig())),
    }
    return hooks[name]()


def rows(first: int, last: int, **more: float) -> list[dict[str, Any]]:
    return [{"step": step, "loss": 1 / step, "mfu": None, **more} for step in range(first, last + 1)]


def test_loggers_combine() -> None:
    config = typed_config([f"logger=[{','.join(ALL)}]"])
    assert [name for name, _ in hook_order(config) if name in ALL] == ALL
    assert not set(ALL) & {name for name, _ in hook_order(typed_config(["logger=jsonl"]))}
    assert [name for name, _ in hook_order(typed_config(["logger=[jsonl,wandb]"])) if name in ALL] == ["wandb"]


def test_where_metrics_go_makes_no_other_run() -> None:
    given = [f"logger=[{','.join(ALL)}]", "mlflow.experiment=mine", "tensorboard.folder=/x", "wandb.diff_bytes=0"]
    assert config_hash(settings_of(given)) == config_hash(settings_of([]))


@pytest.mark.parametrize(("name", "package"), [(n, n) for n in ALL if n != "csv"] + [("mlflow", "alembic")])
def test_a_library_that_is_not_installed_is_told_before_training(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    expected = f"logger={name} must find the package {package}, but it is not installed; use pip install"
    with pytest.raises(ValueError, match=expected) as told:
        hook_of(name)
    assert f"'regrow[{name}]'" in str(told.value)


def test_less_than_no_changes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"wandb.diff_bytes must be at least 0, but is -1; use 0"):
        WandbHook(WandbHookConfig(settings=WandbConfig(diff_bytes=-1)))


def record(*lineages: Lineage, changes: int = 0, wandb_step: int = 0) -> RunRecord:
    return RunRecord(lineages=list(lineages), changes=[{}] * changes, wandb_step=wandb_step)


FIRST = Lineage(id="0-aaaa")
BACK = Lineage(id="1-bbbb", origin=StartKind.step, origin_step=20, parent="0-aaaa")


def test_the_first_lineage_is_the_run_itself_and_a_later_one_a_child() -> None:
    assert begin_line(record(FIRST), None) == LoggerLine(lineage="0-aaaa")
    child = begin_line(record(FIRST, BACK), begin_line(record(FIRST), None))
    assert child == LoggerLine(lineage="1-bbbb", branch="1-bbbb", from_step=20)
    # It goes on there, whatever is asked of it next.
    assert begin_line(record(FIRST, BACK), child) == child


def test_what_a_former_version_noted_counts_for_the_first_lineage_alone() -> None:
    assert begin_line(record(FIRST, wandb_step=90), None).step == 90
    assert begin_line(record(FIRST, BACK, wandb_step=90), None).step == 0


def test_a_change_makes_a_child_only_of_steps_that_are_computed_again() -> None:
    known = LoggerLine(lineage="0-aaaa", step=30)
    same, changed = begin_line(record(FIRST), known), begin_line(record(FIRST, changes=1), known)
    assert needs_child(same, known, held=28, resumed_from=20) is None
    assert needs_child(changed, known, held=20, resumed_from=20) is None
    assert needs_child(changed, None, held=28, resumed_from=20) is None
    child = needs_child(changed, known, held=28, resumed_from=20)
    assert child == LoggerLine(lineage="0-aaaa", branch="0-aaaa-1", from_step=20, changes=1)
    # The next start goes on in it.
    again = begin_line(record(FIRST, changes=1), child)
    assert needs_child(again, child, held=28, resumed_from=20) is None
    assert again.branch == "0-aaaa-1"


def test_a_note_is_read_as_it_was_written_and_a_damaged_one_is_no_absent_one(tmp_path: Path) -> None:
    path, line = tmp_path / "loggers/csv.json", LoggerLine(lineage="1-b", branch="1-b-2", from_step=3, changes=2)
    assert read_line(path) is None
    write_line(path, line)
    assert read_line(path) == line
    path.write_text(path.read_text().replace('"1-b-2"', '"../x"'))
    with pytest.raises(DocumentError):
        read_line(path)


def test_a_tail_reads_each_row_once_and_a_cut_one_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = RowTail(path)
    assert tail.read() == []
    log = StepLog(path, 0)
    log.append({"step": 1})
    log.append({"step": 2})
    assert [row["step"] for row in tail.read()] == [1, 2]
    assert tail.read() == []
    with path.open("a") as out:
        out.write('{"step": 3')
    assert tail.read() == []
    with path.open("a") as out:
        out.write('}\nnonsense\n{"step": 4}\n')
    assert [row["step"] for row in tail.read()] == [3, 4]
    log.close()


def last_steps(name: str, run_dir: Path) -> list[int]:
    """What a store says of itself: new, written to, opened again, and of a child."""
    store = opened(name, run_dir)
    found = [store.last_step()]
    store.write(rows(1, 20))
    found.append(store.last_step())
    store.write(rows(21, 22, val_loss=1.0))
    store.close(None)
    found.append(opened(name, run_dir).last_step())
    return [*found, opened(name, run_dir, LoggerLine(lineage="1-b", branch="1-b")).last_step()]


@pytest.mark.parametrize("name", ["csv", "tensorboard"])
def test_a_store_knows_its_own_last_step(name: str, tmp_path: Path) -> None:
    assert last_steps(name, tmp_path) == [0, 20, 22, 0]


@pytest.mark.parametrize("cut", range(1, 40, 6))
def test_a_csv_line_that_a_kill_cut_short_is_written_again(cut: int, tmp_path: Path) -> None:
    store = opened("csv", tmp_path)
    store.write(rows(1, 5))
    store.close(None)
    path = tmp_path / "metrics.csv"
    path.write_bytes(path.read_bytes()[:-cut])
    store = opened("csv", tmp_path)
    last = store.last_step()
    assert last in (2, 3, 4)
    store.write(rows(last + 1, 6, val_loss=0.5))
    store.close(None)
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [int(row["step"]) for row in found] == [1, 2, 3, 4, 5, 6]
    assert [float(row["loss"]) for row in found] == [1 / step for step in range(1, 7)]
    assert [row["val_loss"] for row in found] == [""] * last + ["0.5"] * (6 - last)


def test_a_folder_of_its_own_tells_runs_apart(tmp_path: Path) -> None:
    for line in (LoggerLine(lineage="0-a"), LoggerLine(lineage="1-b", branch="1-b")):
        store = opened("csv", tmp_path / "run", line, f"{tmp_path}/tables")
        store.write(rows(1, 1))
        store.close(None)
    assert sorted(p.name for p in (tmp_path / "tables").iterdir()) == ["a-1-b.csv", "a.csv"]


def test_an_event_that_a_kill_cut_short_is_written_again(tmp_path: Path) -> None:
    store = opened("tensorboard", tmp_path)
    store.write(rows(1, 5))
    store.close(None)
    (file,) = (tmp_path / "tensorboard").iterdir()
    file.write_bytes(file.read_bytes()[:-3])
    assert opened("tensorboard", tmp_path).last_step() == 4


def test_records_end_where_a_kill_has_cut_them(tmp_path: Path) -> None:
    """Records of LevelDB's format over several blocks, as its documentation has them."""
    path, texts = tmp_path / "x.wandb", [b"a" * 10, b"b" * 70_000, b"c" * 3]
    data = b":W&B\x00\x00\x00"
    for text in texts:
        left, first = text, True
        while left or first:
            room = 32768 - len(data) % 32768
            if room < 7:
                data += bytes(room)
                continue
            part, left = left[: room - 7], left[room - 7 :]
            kind = (1 if not left else 2) if first else (4 if not left else 3)
            data += bytes(4) + len(part).to_bytes(2, "little") + bytes([kind]) + part
            first = False
    path.write_bytes(data)
    assert list(read_log_records(path)) == texts
    for size, count in ((len(data) - 1, 2), (40_000, 1), (12, 0), (3, 0), (0, 0)):
        path.write_bytes(data[:size])
        assert list(read_log_records(path)) == texts[:count]


def test_a_project_tells_its_revision_and_so_much_of_what_is_not_committed(tmp_path: Path) -> None:
    assert read_user_project(tmp_path, 1000) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "below").mkdir()
    note = tmp_path / "below/note.txt"
    note.write_text("one\n")
    subprocess.run([*git, "init", "-q"], check=True)
    assert read_user_project(tmp_path, 1000) is None
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "first"], check=True)
    clean = read_user_project(tmp_path / "below", 1000)
    assert clean is not None
    assert (len(clean.revision), clean.diff, clean.is_cut) == (40, "", False)
    note.write_text("two\n" * 10_000)
    changed, cut = read_user_project(tmp_path, 1_000_000), read_user_project(tmp_path, 500)
    assert changed is not None
    assert cut is not None
    assert "+two" in changed.diff
    assert not changed.is_cut
    assert cut == dataclasses.replace(changed, diff=changed.diff[:500], is_cut=True)
    assert read_user_project(tmp_path, 0) == dataclasses.replace(changed, diff="", is_cut=False)
