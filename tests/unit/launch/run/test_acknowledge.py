"""What is said of a signal, when, and how often."""

import os
import pickle
import signal
import time
from collections.abc import Iterator

import pytest

from regrow.launch.run.acknowledge import acknowledging, speaks_for_all
from regrow.launch.run.signals import SIGNALS, StopFlag
from regrow.trainer.process import Interrupted, interrupted_by
from tests.support import wait_until


@pytest.fixture
def flag() -> Iterator[StopFlag]:
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    made = StopFlag(exits=False)
    made.install()
    yield made
    for number, handler in previous.items():
        signal.signal(number, handler)


def test_the_first_signal_is_acknowledged_once(flag: StopFlag, caplog: pytest.LogCaptureFixture) -> None:
    flag.train()
    with acknowledging(flag):
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGUSR2)
            wait_until(lambda: bool(caplog.messages))
        time.sleep(0.05)
    assert caplog.messages == ["SIGUSR2: the step under way is finished, the state is saved, then the run ends"]
    assert flag.received == signal.SIGUSR2


def test_whoever_was_told_of_signals_before_is_told_again(flag: StopFlag) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer)
    try:
        with acknowledging(flag):
            pass
        flag.train()
        os.kill(os.getpid(), signal.SIGTERM)
        assert os.read(reader, 8) == bytes([signal.SIGTERM])
    finally:
        signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)


def test_before_the_first_step_the_program_itself_says_how_it_ended(
    flag: StopFlag, caplog: pytest.LogCaptureFixture
) -> None:
    with acknowledging(flag):
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGTERM)
        assert not caplog.messages
        wait_until(lambda: bool(caplog.messages))
    assert caplog.messages == ["SIGTERM: stopping before the first step, so that nothing is lost"]


def test_sentences() -> None:
    flag = StopFlag()
    flag.train()
    assert flag.sentence(signal.SIGINT).endswith("Ctrl-C again ends it at once, without saving")
    flag.saves = False
    assert "then the run ends; nothing is saved" in flag.sentence(signal.SIGTERM)
    # A launcher passes Ctrl-C on as TERM.
    flag.cause = lambda: signal.SIGINT
    assert flag.sentence(signal.SIGTERM).startswith("Ctrl-C: ")
    flag.passes_on = True
    assert not flag.sentence(signal.SIGINT)
    assert isinstance(pickle.loads(pickle.dumps(StopFlag())), StopFlag)


@pytest.mark.parametrize(
    ("environ", "speaks"),
    [({}, True), ({"RANK": "0"}, True), ({"RANK": "3"}, False), ({"SLURM_PROCID": "1"}, False)],
)
def test_one_rank_speaks(environ: dict[str, str], speaks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert speaks_for_all() is speaks


def test_an_error_on_the_way_out_does_not_hide_the_signal() -> None:
    try:
        try:
            raise Interrupted(signal.SIGINT)
        finally:
            raise KeyError("gone")
    except KeyError as error:
        found = interrupted_by(error)
        assert found is not None
        assert found.signal_number == signal.SIGINT
    assert interrupted_by(ValueError("another")) is None
