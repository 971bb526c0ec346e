"""Bars on a terminal, lines elsewhere; and numbers as people say them."""

import logging
import os
import sys
import time
from pathlib import Path

import pytest

from regrow.trainer.bars import Bar, figures, is_live, showing
from regrow.trainer.wording import count_text, duration, size_text
from tests.terminal import on_terminal


def test_figures() -> None:
    assert figures(0, 10**9, 0.0) == "0 of 1,000 MB"
    assert figures(250 * 10**6, 4 * 10**9, 12.5) == "250 of 4,000 MB, 20.0 MB/s, 3 min 08 s left"
    assert figures(10**9, 10**12, 50.0) == "1,000 of 1,000,000 MB, 20.0 MB/s, 13 h 52 min left"
    assert figures(10**6, 10**6, 1.0) == "1 of 1 MB, 1.0 MB/s, 0 s left"


def test_numbers_as_people_say_them() -> None:
    counts = (0, 987, 9_999, 12_345, 999_499, 999_600, 1_234_567, 8_030_261_248, 15e12)
    assert [count_text(n) for n in counts] == [
        "0", "987", "9,999", "12.3 k", "999 k", "1 M", "1.23 M", "8.03 B", "15 T",
    ]  # fmt: skip
    assert [size_text(n) for n in (0, 900, 2**20, 5 * 2**40)] == ["0 B", "900 B", "1.0 MiB", "5.0 TiB"]
    assert [duration(s) for s in (7.4, 200, 7500, 273_600)] == ["7 s", "3 min 20 s", "2 h 05 min", "3 d 4 h"]


def test_a_line_every_ten_seconds_where_there_is_no_terminal(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), Bar("verifying") as bar:
        bar.update(10**6, 10**7)
        assert not caplog.messages
        bar._said -= 11.0
        for _ in range(3):
            bar.update(5 * 10**6, 10**7)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("verifying: 5 of 10 MB, ")


def test_nothing_is_shown_where_nobody_wants_to_know() -> None:
    with showing("verifying", quiet=True) as bar:
        assert bar is None


def test_what_is_no_terminal_is_never_drawn_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert not sys.stderr.isatty()
    assert not is_live()


def _wait_behind_a_bar() -> None:
    with Bar("converting") as bar:
        for done in range(41):
            bar.update(done * 10**6, 40 * 10**6)
            time.sleep(0.05)
    sys.stderr.write("converted\n")
    sys.stderr.flush()
    os._exit(0)


def test_a_bar_on_a_terminal_leaves_nothing_behind(tmp_path: Path) -> None:
    with on_terminal([], tmp_path, main=_wait_behind_a_bar) as session:
        session.wait_for(lambda text: "converting" in text and " of 40 MB" in text and "━" in text)
        assert session.end() == 0
        assert session.text() == "converted"
