"""How a rank fails: whose word counts, what the storage says, and logs that a full disk does not take."""

import errno
import logging
import os
from pathlib import Path

import pytest

from regrow.checkpoint.files import naming, write_json
from regrow.launch.run.failures import clear_failures, first_failure, note_failure, saw_another_go, storage_problem
from regrow.launch.run.logs import LogFile, log_to_files
from regrow.trainer.jsonlines import read_rows
from regrow.trainer.run_record import RunRecordError


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    return tmp_path


@pytest.mark.parametrize("code", ["EIO", "ENOSPC", "ESTALE", "EDQUOT", "EROFS", "ELOOP", "EISDIR", "EEXIST"])
def test_what_a_storage_answers_is_one_sentence(code: str) -> None:
    number = getattr(errno, code)
    sentence = storage_problem(OSError(number, os.strerror(number), "/runs/a/run.json"))
    assert sentence is not None
    assert "/runs/a/run.json" in sentence
    assert os.strerror(number) in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize(
    "error",
    [ConnectionResetError(errno.ECONNRESET, "reset"), OSError(errno.EBADF, "bad"), ValueError("no"), OSError("x")],
)
def test_other_errors_keep_their_tracebacks(error: Exception) -> None:
    assert storage_problem(error) is None


def test_a_damaged_record_says_so_itself() -> None:
    assert storage_problem(RunRecordError("run.json must be…")) == "run.json must be…"


def test_only_a_rank_that_was_left_alone_is_quiet(run_dir: Path) -> None:
    closed = RuntimeError("Connection closed by peer")
    assert not saw_another_go(run_dir, 1, closed)
    note_failure(run_dir, 1, closed)
    assert not saw_another_go(run_dir, 1, closed)
    assert saw_another_go(run_dir, 0, closed)
    assert not saw_another_go(run_dir, 0, TypeError("a bug"))
    assert first_failure(run_dir) == "rank 1: RuntimeError: Connection closed by peer"
    clear_failures(run_dir, 0)
    assert saw_another_go(run_dir, 0, closed)
    clear_failures(run_dir, 1)
    assert first_failure(run_dir) is None


def test_a_full_disk_makes_no_traceback_of_each_line(capfd: pytest.CaptureFixture[str]) -> None:
    handler = LogFile(Path("/dev/full"))
    for n in range(3):
        handler.handle(logging.LogRecord("x", logging.INFO, "here", 1, "line %d", (n,), None))
    handler.close()
    said = capfd.readouterr().err
    assert said == "/dev/full cannot be written (No space left on device); it will miss lines\n"


def make_folder(path: Path) -> None:
    path.mkdir()


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("make", [make_folder, os.mkfifo, make_loop])
def test_a_rank_goes_on_without_its_log(run_dir: Path, make: object) -> None:
    assert callable(make)
    make(run_dir / "logs/rank-0.log")
    handler = log_to_files(run_dir, 0, console=False)
    logging.getLogger("x").warning("goes nowhere")
    logging.getLogger().removeHandler(handler)
    handler.close()


def test_rows_are_read_from_regular_files_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows")
    with pytest.raises(OSError, match="Not a regular file"):
        list(read_rows(tmp_path / "rows"))
    assert list(read_rows(tmp_path / "none")) == []


def test_an_error_of_a_descriptor_gets_its_path(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="a.json"), naming(tmp_path / "a.json"):
        os.write(os.open("/dev/full", os.O_WRONLY), b"x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_json(tmp_path / "folder", {})
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
