"""`regrow.train`: a run from a script or a notebook, as the command would do it."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist

from regrow.errors import ConfigError
from regrow.launch.config.schema import Config
from regrow.launch.exit_code import ExitCode
from regrow.launch.run.acknowledge import acknowledging
from regrow.launch.run.allocator import use_expandable_segments
from regrow.launch.run.failures import RankFailed, first_failure
from regrow.launch.run.logs import log_to_console
from regrow.launch.run.prepare import prepare_run
from regrow.launch.run.rank_spec import Outcome
from regrow.launch.run.signals import SIGNALS, Interrupted, StopFlag
from regrow.launch.run.start import run_spec
from regrow.trainer.places import ensure_home
from regrow.trainer.run_files import METRICS
from regrow.trainer.start_marks import begin

__all__ = ["TrainResult", "TrainingFailedError", "train"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """How a run ended.

    Attributes:
        run_dir: the run's directory.
        step: that it has reached.
        reason: `finished`; or `terminated` or `preempted`, where it was stopped and saved.
        exit_code: of the command that does the same: 0 finished, 3 stopped and resumable.
        message: of a failure, else empty.
    """

    run_dir: Path
    step: int
    reason: str
    exit_code: int
    message: str = ""

    @property
    def finished(self) -> bool:
        """Whether the run came to its last step."""
        return self.exit_code == 0

    @property
    def metrics_path(self) -> Path:
        """`metrics.jsonl`: one row a step; see `regrow.read_metrics`."""
        return self.run_dir / METRICS


class TrainingFailedError(RuntimeError):
    """A run failed after it began to train.

    Attributes:
        result: how far it came.
    """

    def __init__(self, result: TrainResult) -> None:
        super().__init__(result.message)
        self.result = result


def train(config: Config) -> TrainResult:
    """Trains the run that a config describes, or continues it; the same as the command with these overrides.

    One rank trains in this process. Several are started as processes of their own, so a script needs no
    `if __name__ == "__main__"`. Where torchrun or srun started this process, it trains as its rank.

    Ctrl-C and SIGTERM save and end the run; the same call continues it. They are handled only while this runs, and
    only where it is called in the main thread.

    Args:
        config: of `regrow.compose`. It is left as it is.

    Returns:
        How the run ended, where it finished or was stopped.

    Raises:
        ConfigError: bad input, found before training; one sentence.
        TrainingFailedError: the run failed while it trained.
        KeyboardInterrupt: Ctrl-C before the first step, when nothing is to be saved.
    """
    if dist.is_initialized():
        raise ConfigError(
            "regrow.train must be called outside of torch.distributed's process groups, but one is open; call "
            "torch.distributed.destroy_process_group() first"
        )
    ensure_home()
    use_expandable_segments(os.environ)
    log_to_console()
    begin()
    run_dir, flag = Path(config.run.root, config.run.name).absolute(), StopFlag(exits=False)
    with _signals_handled(flag), acknowledging(flag), _torch_settings_kept():
        try:
            with _main_hidden():
                spec = prepare_run(config, run_dir)
            outcome = run_spec(spec, flag)
        except RankFailed as error:
            outcome = Outcome(kind="failed", step=0, message=first_failure(run_dir) or str(error))
        except Interrupted as stop:
            if stop.signal_number == signal.SIGINT:
                raise KeyboardInterrupt from None
            kind = "preempted" if stop.signal_number == signal.SIGUSR2 else "terminated"
            outcome = Outcome(kind=kind, step=0)
    return _result(run_dir, outcome)


def _result(run_dir: Path, outcome: Outcome) -> TrainResult:
    if outcome.kind == "refused":
        raise ConfigError(outcome.message)
    result = TrainResult(
        run_dir=run_dir,
        step=outcome.step,
        reason=outcome.kind,
        exit_code=int(outcome.exit_code),
        message=outcome.message,
    )
    if outcome.exit_code is ExitCode.failed:
        raise TrainingFailedError(result)
    return result


@contextmanager
def _signals_handled(flag: StopFlag) -> Iterator[None]:
    """Requests to stop go to the flag inside the block; outside of the main thread Python allows no handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    flag.install()
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _main_hidden() -> Iterator[None]:
    """Keeps processes that tokenise a corpus from running the caller's script: Python's `spawn` imports it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextmanager
def _torch_settings_kept() -> Iterator[None]:
    """A run pins torch's threads and may ask for deterministic operations; the caller's settings come back."""
    threads, operations = torch.get_num_threads(), _kinds_of_operations()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        # Asking for what there is would load torch's compiler.
        if _kinds_of_operations() != operations:
            deterministic, warn_only = operations
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def _kinds_of_operations() -> tuple[bool, bool]:
    """Whether they must be deterministic, and whether others only warn."""
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
