"""Starting a run's ranks on this machine with torch's own elastic agent."""

import logging
import os
import pickle
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

import psutil
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import elastic_launch

from regrow.checkpoint.scratch import scratch_folder
from regrow.launch.config.errors import naming_fields
from regrow.launch.run.elastic import elastic_config
from regrow.launch.run.failures import failure_of, first_failed
from regrow.launch.run.rank_spec import OUTCOME, Outcome, RankSpec, read_outcome
from regrow.launch.run.signals import SIGNALS, STOP_NOTE, StopFlag, show_cursor
from regrow.trainer.process import PARENT_VARIABLE
from regrow.trainer.start_marks import STARTED_VARIABLE

__all__ = ["run_local"]

log = logging.getLogger(__name__)


def run_local(spec: RankSpec, flag: StopFlag) -> Outcome:
    """Starts the ranks, passes signals on to them, restarts them as often as allowed, and says how it ended.

    Args:
        spec: of the run.
        flag: this process' handler, which decides what a second Ctrl-C does. Outside of the main thread Python allows
            no handlers, and signals are not passed on.
    """
    with naming_fields(("run.root", spec.run_dir / OUTCOME)):
        (spec.run_dir / OUTCOME).unlink(missing_ok=True)
    with scratch_folder() as folder:
        spec_file = folder / "spec"
        with spec_file.open("wb") as out:
            pickle.dump(spec, out)
        os.environ[PARENT_VARIABLE] = str(os.getpid())
        os.environ.setdefault(STARTED_VARIABLE, str(psutil.Process().create_time()))
        own_threads = "OMP_NUM_THREADS" not in os.environ
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        handles = threading.current_thread() is threading.main_thread()
        previous = {number: signal.getsignal(number) for number in SIGNALS} if handles else {}
        received = _pass_signals_on(spec_file.with_name(STOP_NOTE), flag) if handles else []
        flag.passes_on = handles
        try:
            # -P keeps the working directory off the path: it may hold folders named like our packages.
            config = elastic_config(spec.layout.world_size, folder, restarts=spec.config.launch.max_restarts)
            elastic_launch(config, sys.executable)("-P", "-u", "-m", "regrow.launch.run.worker", str(spec_file))
        except ChildFailedError as error:
            return _failure(spec, error, received)
        finally:
            flag.passes_on = False
            for number, handler in previous.items():
                signal.signal(number, handler)
            os.environ.pop(PARENT_VARIABLE, None)
            os.environ.pop(STARTED_VARIABLE, None)
            if own_threads:
                # The next run of this process takes its share of the cores, not this one's number.
                os.environ.pop("OMP_NUM_THREADS", None)
    return read_outcome(spec.run_dir) or Outcome(kind="failed", step=0, message="the ranks left no stop record")


def _ranks() -> list[psutil.Process]:
    """This launcher's children that are ranks."""
    return [c for c in psutil.Process().children() if "regrow.launch.run.worker" in c.cmdline()]


def _pass_signals_on(note: Path, flag: StopFlag) -> list[int]:
    """Sends what this process receives to the ranks, which save and end; returns the list of what came.

    Args:
        note: a file for ranks whose handlers do not stand yet, and for those that the agent starts again.
        flag: says what a second Ctrl-C does.
    """
    received: list[int] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        if received.count(signal.SIGINT) > 1:
            show_cursor()
            for rank in _ranks():
                rank.kill()
            flag.leave()
        note.write_text(str(number))
        for rank in _ranks():
            rank.send_signal(signal.SIGUSR2 if number == signal.SIGUSR2 else signal.SIGTERM)

    for number in SIGNALS:
        signal.signal(number, handle)
    return received


def _failure(spec: RankSpec, error: ChildFailedError, received: list[int]) -> Outcome:
    if received:
        # Ended while it was starting: nothing was lost, and the same command goes on.
        kind = "preempted" if received[0] == signal.SIGUSR2 else "terminated"
        return read_outcome(spec.run_dir) or Outcome(kind=kind, step=0)
    # A rank that a signal killed says nothing; the others say that they saw it go. The agent itself sends TERM.
    killed = [(r, f) for r, f in error.failures.items() if f.exitcode < 0 and f.exitcode != -signal.SIGTERM]
    rank, first = min(killed, key=lambda pair: pair[1].timestamp, default=error.get_first_failure())
    told = first_failed(spec.run_dir)
    if not killed and told is not None:
        # The agent may have noticed another one's end first.
        rank, first = told, error.failures.get(told, first)
    how = f"signal {signal.Signals(-first.exitcode).name}" if first.exitcode < 0 else f"exit code {first.exitcode}"
    where = spec.run_dir / "logs" / f"rank-{rank}.log"
    message = failure_of(spec.run_dir, rank) or f"rank {rank} died ({how})"
    outcome = read_outcome(spec.run_dir)
    if outcome is not None and outcome.message:
        return outcome
    return Outcome(kind="failed", step=0, message=f"{message}; its log is {where}")
