"""The display's own lines; a whole run on a terminal is in tests/faults/test_display.py."""

import io
import re
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from regrow.checkpoint.save.progress import SaveProgress, SaveStage
from regrow.trainer.hooks.display import Display, cell, flow
from regrow.trainer.hooks.progress import format_row

ROW: dict[str, Any] = {
    "step": 7, "loss": 3.25, "grad_norm": 0.5, "lr": 3e-4, "tokens_per_s": 12_345.6, "step_time_s": 0.5,
    "data_wait_s": 0.05, "memory_gib": 3.2, "mfu": None,
}  # fmt: skip


def drawn(display: Display, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(display)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def display(save: SaveProgress | None = None) -> Display:
    return Display(Console(file=io.StringIO()), name="mine", steps=100, step=0, save=save)


def test_it_says_what_a_row_says() -> None:
    shown = display()
    assert "the first step is under way" in drawn(shown)
    shown.note_row(ROW)
    text = drawn(shown)
    for words in ("step 7 of 100", "7%", "loss 3.2500", "grad norm 0.500", "lr 3.00e-04", "tokens/s 12,346",
                  "data wait 10%", "memory 3.2 GiB", "time left not known yet", "none is saved"):  # fmt: skip
        assert words in text, text
    assert "MFU" not in text
    shown.note_row(ROW | {"step": 8, "mfu": 0.412, "grad_norm": None})
    assert "MFU 41.2%" in drawn(shown)
    assert "grad norm not finite" in drawn(shown)
    assert re.search(r"time left \d+ s", drawn(shown))


def test_results_stay_until_there_are_others() -> None:
    shown = display()
    shown.note_row(ROW | {"val_loss": 3.5, "val_loss/news": 3.75, "eval/arc/accuracy": 0.25, "eval_time_s": 1.0})
    shown.note_row(ROW | {"step": 8})
    text = drawn(shown)
    assert "validation at step 7   loss 3.5000   news 3.7500" in text
    assert "evaluation at step 7   arc/accuracy 0.2500" in text
    shown.note_row(ROW | {"step": 9, "val_loss": 3.0})
    assert "validation at step 9   loss 3.0000" in drawn(shown)
    assert "evaluation at step 7" in drawn(shown)


def test_the_state_of_the_checkpoint() -> None:
    save = SaveProgress()
    shown = display(save)
    assert "checkpoint   none yet" in drawn(shown)
    save.begin(400, 1000)
    assert "checkpoint   step 400 staging" in drawn(shown)
    windows = save.counting(0, iter([memoryview(bytes(630)), memoryview(bytes(370))]))
    next(windows)
    assert "step 400 writing 0%" in drawn(shown)
    next(windows)
    assert "step 400 writing 63%" in drawn(shown)
    list(windows)
    save.commit()
    assert "step 400 committing" in drawn(shown)
    save.end(saved=True)
    shown.note_commit(400)
    assert "checkpoint   committed step 400" in drawn(shown)
    save.begin(800, 1000)
    assert "step 800 staging   committed step 400" in drawn(shown)
    save.end(saved=False)
    assert "step 800 was not saved   committed step 400" in drawn(shown)


@given(
    st.lists(st.tuples(st.text("abc ", min_size=1, max_size=12), st.text("0123456789", max_size=50)), max_size=8),
    st.integers(20, 100),
)
def test_no_line_is_wider_than_the_window(words: list[tuple[str, str]], width: int) -> None:
    cells = [cell(label, value) for label, value in words]
    lines = flow(cells, width)
    assert all(line.cell_len <= width for line in lines)
    if all(each.cell_len <= width for each in cells):
        assert "   ".join(c.plain for c in cells).split() == " ".join(line.plain for line in lines).split()


@pytest.mark.parametrize("width", [20, 40, 81, 200])
def test_the_whole_of_it_fits_into_any_window(width: int) -> None:
    shown = display(SaveProgress())
    shown.note_row(ROW | {"val_loss": 3.5, **{f"eval/task-{n}/accuracy": 0.5 for n in range(6)}})
    assert max(map(len, drawn(shown, width).splitlines())) < width


def test_files_that_are_written_at_once_are_added_up() -> None:
    save = SaveProgress()
    save.begin(1, 800)

    def write(file: int) -> None:
        for _ in save.counting(file, iter([memoryview(bytes(10))] * 20)):
            pass

    threads = [threading.Thread(target=write, args=(file,)) for file in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (save.stage, save.written_bytes) == (SaveStage.writing, 800)


def test_a_line_has_all_results() -> None:
    row = ROW | {"mfu": 0.4, "val_loss": 3.5, "eval/arc/accuracy": 0.25}
    assert format_row(row) == (
        "loss 3.2500  grad_norm 0.500  lr 3.00e-04  12,346 tokens/s  mfu 40.0%  data_wait 10%  memory 3.2 GiB  "
        "val_loss 3.5000  eval/arc/accuracy 0.2500"
    )
