"""What a run shows: on a real terminal, piped, and in a Slurm log; and how fast it answers to Ctrl-C."""

import re
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from regrow.trainer.hooks.throttle import ThrottleHook
from regrow.trainer.loop import Trainer
from tests.support import metrics, tiny
from tests.terminal import on_terminal
from tests.warm import regrow

pytestmark = pytest.mark.slow

RUN = ["run.name=run", "hooks.validation.every=4", "hooks.validation.max_batches=1", "checkpoint.interval=4"]
# A log line of the console, whole: the clock, then words.
LINE = re.compile(r"\d\d:\d\d:\d\d \S")
BANNER = ["model", "device", "data", "steps", "checkpoint", "run"]


def banner(text: str) -> list[str]:
    """The banner's names, in the order of the lines."""
    names = "|".join(BANNER)
    return re.findall(rf"(?m)^\d\d:\d\d:\d\d ({names}) {{2,}}\S", text)


def log_file(folder: Path) -> str:
    return (folder / "outputs/run/logs/rank-0.log").read_text()


def test_a_terminal_shows_the_run(corpus: Path, tmp_path: Path) -> None:
    """Over lines of other hooks, a window that becomes narrower and wider, saves and validations."""
    slow = ["+hook@hooks.slow=throttle", "hooks.slow.seconds=0.2"]
    with on_terminal(tiny(corpus, "train.steps=12", *RUN, *slow), tmp_path, columns=140) as session:
        session.wait_for(lambda text: "step 2 of 12" in text)
        session.resize(60)
        session.wait_for(lambda text: "step 6 of 12" in text)
        narrow = session.visible()
        session.resize(100)
        assert session.end() == 0
        text = session.text()
        wide = session.visible()
    for seen in (narrow, wide):
        shown = seen[seen.rindex("\nrun\n") :]
        # What was validated stays on the screen at the steps that follow.
        assert re.search(r"validation at step \d+   loss \d\.\d{4}", shown), shown
        assert re.search(r"loss \d\.\d{4}   grad norm", shown), shown
        assert "tokens/s" in shown
        assert "data wait" in shown
        assert "memory" in shown
    assert "time left" in narrow
    assert "committed step 12" in wide
    assert banner(text) == BANNER
    # Nothing is torn: the display stands there once, and above it there is nothing but the log.
    assert text.count("step 12 of 12") == 1
    assert len(re.findall(r"(?m)^tokens/s", text)) == 1
    above = text[: text.rindex("\nrun\n")]
    assert all(re.search(rf"(?m)^\d\d:\d\d:\d\d step {n}/12 ", above) for n in (1, 4, 8, 12))
    assert "grad norm" not in above
    assert "─" not in above
    assert re.findall(r"INFO step (\d+)/12 ", log_file(tmp_path)) == [str(n) for n in range(1, 13)]
    assert "\x1b" not in log_file(tmp_path)
    # The cursor, which the display hides, is there again.
    assert session.received.rindex(b"\x1b[?25h") > session.received.rindex(b"\x1b[?25l")


@pytest.mark.parametrize(
    "environ",
    [{"FORCE_COLOR": "1"}, {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "TERM": "xterm"}],
    ids=["piped", "slurm"],
)
def test_elsewhere_there_are_plain_lines(corpus: Path, tmp_path: Path, environ: dict[str, str]) -> None:
    code, out = regrow(tiny(corpus, "train.steps=8", "train.log_every=3", *RUN), tmp_path, 120.0, **environ)
    assert code == 0, out
    assert "\x1b" not in out
    assert "\r" not in out
    # Every third, the first and the last, and those that were validated.
    assert re.findall(r"(?m)^\d\d:\d\d:\d\d step (\d+)/8 ", out) == ["1", "3", "4", "6", "8"]
    assert re.findall(r"INFO step (\d+)/8 ", log_file(tmp_path)) == [str(n) for n in range(1, 9)]
    assert banner(out) == BANNER
    assert all(LINE.match(line) for line in out.splitlines()), out


def test_a_terminal_that_cannot_be_drawn_on_has_plain_lines(corpus: Path, tmp_path: Path) -> None:
    with on_terminal(tiny(corpus, "train.steps=4", *RUN), tmp_path, TERM="dumb") as session:
        assert session.end() == 0
    assert b"\x1b" not in session.received
    assert b"step 4/4 " in session.received


def test_the_banner_says_what_it_continues_from(corpus: Path, tmp_path: Path) -> None:
    first, again = (regrow(tiny(corpus, f"train.steps={n}", *RUN, "run.extend=hold"), tmp_path) for n in (4, 6))
    assert first[0] == again[0] == 0, again[1]
    assert "state: fresh weights; continuing after step 0" in first[1]
    assert f"step 4 of {tmp_path}/outputs/run/checkpoint/step-4, verified; continuing after step 4" in again[1]
    stored = sum(f.stat().st_size for f in (tmp_path / "outputs/run/checkpoint/step-4").iterdir())
    said = re.search(r"async_with_pinned_mem; ([\d.]+) KiB a step", first[1])
    assert said is not None
    assert 0.5 * stored < float(said[1]) * 1024 < stored


def _backward(size: int, began: Path | None = None) -> float:
    """One backward pass, in which no Python runs, and which takes twelve times its forward pass; its seconds."""
    matrix = (torch.eye(size, dtype=torch.float64) * 2.0).requires_grad_()
    loss = torch.linalg.cholesky(matrix).sum()
    if began is not None:
        began.touch()
    started = time.monotonic()
    loss.backward()
    return time.monotonic() - started


def _long_backward(_hook: ThrottleHook, trainer: Trainer) -> None:
    """In step 2, of about ten seconds; how large that is, a shorter one tells."""
    if trainer.state.step == 1:
        folder, size = trainer.resources.run_dir.parent, 1200
        size = int(size * (11.0 / min(_backward(size), _backward(size))) ** (1 / 3))
        (folder / "took").write_text(str(_backward(size, folder / "began")))


def _train_slowly() -> None:
    from regrow.launch.train import main

    setattr(ThrottleHook, "before_optimizer_step", _long_backward)  # noqa: B010
    main()


def _slow_run(corpus: Path, *more: str) -> Sequence[str]:
    return tiny(corpus, "train.steps=5", *RUN, "+hook@hooks.slow=throttle", "hooks.slow.seconds=0", *more)


def test_ctrl_c_is_answered_at_once_in_a_step_of_ten_seconds(corpus: Path, tmp_path: Path) -> None:
    with on_terminal(_slow_run(corpus), tmp_path, main=_train_slowly, columns=240) as session:
        session.wait_for(lambda _text: (tmp_path / "outputs/began").exists(), timeout_s=90.0)
        pressed = session.press_ctrl_c()
        heard = session.wait_for(lambda text: "Ctrl-C: the step under way is finished" in text)
        assert not (tmp_path / "outputs/took").exists()
        assert heard - pressed < 0.5
        assert session.end(120.0) == 3
        text = session.text()
    assert float((tmp_path / "outputs/took").read_text()) > 5.0
    assert text.count("Ctrl-C: the step") == 1
    said = " ".join(text.split())
    assert "the state is saved, then the run ends; Ctrl-C again ends it at once, without saving" in said, text
    stopped = re.search(r"terminated at step (\d+): \S+/outputs/run; the same command goes on from there", text)
    assert stopped is not None, text
    assert (tmp_path / f"outputs/run/checkpoint/step-{stopped[1]}/manifest.json").exists()


def test_a_second_ctrl_c_ends_at_once_even_then(corpus: Path, tmp_path: Path) -> None:
    with on_terminal(_slow_run(corpus), tmp_path, main=_train_slowly, columns=240) as session:
        session.wait_for(lambda _text: (tmp_path / "outputs/began").exists(), timeout_s=90.0)
        session.press_ctrl_c()
        session.wait_for(lambda text: "Ctrl-C again ends it at once" in text)
        session.press_ctrl_c()
        assert session.end(5.0) == 130
    assert not (tmp_path / "outputs/took").exists()
    assert session.received.rindex(b"\x1b[?25h") > session.received.rindex(b"\x1b[?25l")


def test_several_ranks_answer_once_and_without_colours_where_none_are_wanted(corpus: Path, tmp_path: Path) -> None:
    slow = ["parallel.dp_shard=2", "+hook@hooks.slow=throttle", "hooks.slow.seconds=1"]
    with on_terminal(tiny(corpus, "train.steps=50", *RUN, *slow), tmp_path, columns=240, NO_COLOR="1") as session:
        session.wait_for(lambda text: "step 1 of 50" in text, timeout_s=120.0)
        session.press_ctrl_c()
        session.wait_for(lambda text: "Ctrl-C: the step under way is finished" in text)
        assert session.end(60.0) == 3
        text = session.text()
    assert text.count("Ctrl-C: ") == 1
    assert "SIGTERM" not in text
    assert "the same command goes on from there" in text
    assert metrics(tmp_path / "outputs/run")
    codes = b";".join(re.findall(rb"\x1b\[([\d;]*)m", session.received)).decode()
    assert not re.search(r"(?:^|;)(?:3[0-7]|4[0-7]|9[0-7]|38|48)(?:;|$)", codes)


def test_nothing_is_lost_before_the_first_step(corpus: Path, tmp_path: Path) -> None:
    with on_terminal(tiny(corpus, "train.steps=5", *RUN), tmp_path, columns=240) as session:
        session.wait_for(lambda text: " device  " in text)
        session.press_ctrl_c()
        code = session.end()
        text = session.text()
    assert code == 3, text
    assert "nothing was lost, give the same command again" in text or "goes on from there" in text
