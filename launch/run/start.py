"""Running what was prepared: in this process, on ranks that are started here, or as one of ranks that were given."""

import dataclasses
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from regrow.checkpoint.run.lease import FencingToken
from regrow.launch.config.errors import naming_fields
from regrow.launch.config.refusals import Refused, refusing
from regrow.launch.exit_code import ExitCode
from regrow.launch.run.failures import clear_failures
from regrow.launch.run.local import run_local
from regrow.launch.run.ownership import own_run
from regrow.launch.run.prepare import prepare_run
from regrow.launch.run.rank import run_rank
from regrow.launch.run.rank_spec import Outcome, RankSpec
from regrow.launch.run.rendezvous import share_from_rank_zero
from regrow.launch.run.run_dir import OpenedRun, open_run
from regrow.launch.run.seed import write_seed_checkpoint
from regrow.launch.run.signals import StopFlag
from regrow.trainer.data.corpus import Corpus
from regrow.trainer.run_record import RunRecord
from regrow.trainer.start_marks import begin, mark

__all__ = ["open_spec", "run_config", "run_spec"]

log = logging.getLogger(__name__)


def run_config(
    config: DictConfig, run_dir: Path, *, overrides: Sequence[str], sweep: str | None, flag: StopFlag
) -> tuple[Outcome, bool]:
    """`prepare_run` and `run_spec`; also says whether this is one of ranks that were given."""
    begin()
    spec = prepare_run(config, run_dir, overrides=overrides, sweep=sweep)
    return run_spec(spec, flag), spec.given_ranks


def run_spec(spec: RankSpec, flag: StopFlag) -> Outcome:
    """Opens the run and trains it; one rank trains in this process, several are started here unless they were given.

    Args:
        spec: prepared, not opened.
        flag: the process' signal handler; one that was not installed lets signals do what they do.

    Raises:
        Refused: the command does not fit the run, or another process holds it.
        RankFailed: this is one of several ranks, and has failed; its run's directory says why.
    """
    return _run_given_rank(spec, flag) if spec.given_ranks else _run_here(spec, flag)


def open_spec(spec: RankSpec) -> OpenedRun:
    """Compares the command with the run, and chooses where it goes on. See `open_run`."""
    places = [
        ("run.root", spec.run_dir),
        ("checkpoint.initial_load_path", spec.config.checkpoint.initial_load_path),
        *(("data.cache", folder) for folder in spec.data_folders.values()),
    ]
    with naming_fields(*places):
        corpus = Corpus(spec.data_folders)
        return open_run(spec.config, spec.config_dict, spec.run_dir, corpus, overrides=spec.overrides)


def _run_here(spec: RankSpec, flag: StopFlag) -> Outcome:
    mark("config and checks")
    with own_run(spec.config, spec.run_dir) as ticket:
        clear_failures(spec.run_dir)
        with refusing():
            opened = open_spec(spec)
        if opened.reached is not None:
            return _already_finished(spec, opened.reached)
        outcome = _train_here(dataclasses.replace(spec, ticket=ticket, record=opened.record), flag)
    if not spec.config.checkpoint.create_seed_checkpoint:
        _say_how_it_ended(spec, outcome)
    return outcome


def _say_how_it_ended(spec: RankSpec, outcome: Outcome) -> None:
    """With what goes on from there, where something is left to do."""
    further = ""
    if outcome.exit_code is ExitCode.resumable:
        saves = spec.config.checkpoint.enable and not spec.config.checkpoint.load_only
        goes_on = "the same command goes on from there" if saves else "nothing was saved: it would begin anew"
        further = f"; {goes_on}" if outcome.step else "; nothing was lost, give the same command again"
    log.info("%s at step %d: %s%s", outcome.kind, outcome.step, spec.run_dir, further)


def _train_here(spec: RankSpec, flag: StopFlag) -> Outcome:
    if spec.config.checkpoint.create_seed_checkpoint:
        folder = spec.run_dir / spec.config.checkpoint.folder
        with refusing(), naming_fields(("checkpoint.folder", folder), ("run.root", spec.run_dir)):
            return write_seed_checkpoint(spec)
    if spec.layout.world_size > 1 or spec.config.launch.max_restarts > 0:
        return run_local(spec, flag)
    try:
        return run_rank(spec, flag)
    finally:
        flag.defer(deferring=False)


def _run_given_rank(spec: RankSpec, flag: StopFlag) -> Outcome:
    """A rank that torchrun or srun started: rank 0 opens the run, the others wait for its word."""
    with ExitStack() as held:
        ticket: FencingToken | None = None

        def open_here() -> dict[str, Any]:
            nonlocal ticket
            ticket = held.enter_context(own_run(spec.config, spec.run_dir))
            clear_failures(spec.run_dir)
            with refusing():
                run = open_spec(spec)
            return {"reached": run.reached, "record": run.record.as_json()}

        opened = share_from_rank_zero(open_here, spec.config.launch.timeout_s)
        if isinstance(opened, str):
            raise Refused(opened)
        if opened["reached"] is not None:
            return _already_finished(spec, opened["reached"])
        record = RunRecord.from_json(opened["record"])
        try:
            # Rank 0 makes steps valid, and it is the one that holds the lease.
            outcome = run_rank(dataclasses.replace(spec, ticket=ticket, record=record), flag)
            if ticket is not None:
                _say_how_it_ended(spec, outcome)
            return outcome
        finally:
            flag.defer(deferring=False)


def _already_finished(spec: RankSpec, step: int) -> Outcome:
    log.info("finished already at step %d: %s; raise train.steps to go on", step, spec.run_dir)
    return Outcome(kind="finished", step=step)
