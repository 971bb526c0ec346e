"""One rank: from a spec to a trained model and a stop record."""

import logging
import os

from regrow.checkpoint.errors import CheckpointError, LastSaveError
from regrow.checkpoint.run.lease import LeaseLostError
from regrow.errors import ConfigError
from regrow.launch.exit_code import ExitCode
from regrow.launch.run.compose import compose_trainer
from regrow.launch.run.failures import RankFailed, clear_failures, note_failure, saw_another_go, storage_problem
from regrow.launch.run.logs import log_to_files
from regrow.launch.run.ownership import share_run
from regrow.launch.run.rank_spec import Outcome, RankSpec, write_outcome
from regrow.launch.run.signals import StopFlag
from regrow.trainer.device import pin_threads
from regrow.trainer.loop import NonFiniteLossError, Trainer
from regrow.trainer.parallel.context import close_parallel, open_parallel
from regrow.trainer.process import interrupted_by
from regrow.trainer.start_marks import mark

__all__ = ["run_as_child", "run_rank"]

log = logging.getLogger(__name__)


def run_rank(spec: RankSpec, flag: StopFlag) -> Outcome:
    """Trains on this rank; rank 0 leaves the stop record. Joins and leaves the process groups.

    Errors that would repeat themselves (a loss that is not finite, a step that cannot be loaded, saves that fail)
    become an outcome, so that nobody restarts them; any other error is raised.
    """
    rank, local_ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    handler = log_to_files(spec.run_dir, rank, console=rank == 0)
    # Of a start before this one, where torchrun starts the ranks again.
    clear_failures(spec.run_dir, rank)
    threads = pin_threads(spec.config.launch.threads_per_rank, local_ranks)
    trainer: Trainer | None = None
    try:
        with share_run(spec.run_dir):
            mark("interpreter and imports")
            context = open_parallel(spec.layout, spec.device_type, spec.config.launch.timeout_s)
            mark("process groups")
            trainer = compose_trainer(spec, context, flag, threads)
            mark("model and data")
            outcome = _fit(spec, rank, trainer)
            if rank == 0:
                write_outcome(spec.run_dir, outcome)
            return outcome
    except Exception as error:
        if (stop := interrupted_by(error)) is not None:
            raise stop from None
        problem = storage_problem(error)
        if problem is None and saw_another_go(spec.run_dir, rank, error):
            log.info("rank %d ends, because another one has failed", rank)
            raise RankFailed(str(error), ExitCode.failed) from None
        note_failure(spec.run_dir, rank, error if problem is None else ConfigError(problem))
        if problem is None:
            log.exception("rank %d failed", rank)
            raise
        begun = trainer is not None and trainer.batch is not None
        outcome = Outcome(kind="failed" if begun else "refused", step=_step_of(trainer), message=problem)
        if rank == 0:
            write_outcome(spec.run_dir, outcome)
        if spec.layout.world_size > 1:
            # The other ranks know nothing of it, and would wait for this one.
            raise RankFailed(problem, outcome.exit_code) from None
        return outcome
    finally:
        close_parallel()
        logging.getLogger().removeHandler(handler)
        handler.close()


def _fit(spec: RankSpec, rank: int, trainer: Trainer) -> Outcome:
    """Trains; what ends all ranks alike is an outcome."""
    try:
        result = trainer.fit()
        return Outcome(kind=result.reason.value, step=result.step)
    except (NonFiniteLossError, CheckpointError) as error:
        note_failure(spec.run_dir, rank, error)
        begun = NonFiniteLossError | LeaseLostError | LastSaveError
        before = trainer.batch is None and not isinstance(error, begun)
        kind, step = ("refused", 0) if before else ("failed", trainer.state.step)
        return Outcome(kind=kind, step=step, message=str(error))


def _step_of(trainer: Trainer | None) -> int:
    return 0 if trainer is None or trainer.batch is None else trainer.state.step


def run_as_child(spec: RankSpec, flag: StopFlag) -> ExitCode:
    """`run_rank` in a process of the local launcher, which reads from the run's directory how it ended."""
    try:
        run_rank(spec, flag)
    except RankFailed:
        return ExitCode.failed
    return ExitCode.done
