"""From a composed config to a run's end, without a command around it."""

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from omegaconf import DictConfig

from regrow.launch.app import _already_finished, _open, _prepare, _train_external, refusing
from regrow.launch.run.failures import RankFailed, clear_failures, first_failure
from regrow.launch.run.local import run_local
from regrow.launch.run.run_dir import own_run
from regrow.launch.run.seed import write_seed_checkpoint
from regrow.launch.run.signals import StopFlag
from regrow.launch.run.worker import Outcome, run_rank
from regrow.trainer.hooks.startup import begin, mark

__all__ = ["execute"]


def execute(config: DictConfig, run_dir: Path, flag: StopFlag) -> Outcome:
    """Checks, opens and trains a run, on ranks here or as the rank that this process is.

    Raises:
        UserError: bad input, found before training.
    """
    begin()
    with refusing(), _main_hidden():
        spec, external = _prepare(config, run_dir, None)
    try:
        return _train_external(spec, flag) if external else _train_here(spec, flag)
    except RankFailed as error:
        return Outcome(kind="failed", step=0, message=first_failure(run_dir) or str(error))


@contextmanager
def _main_hidden() -> Iterator[None]:
    """Keeps processes that tokenise a corpus from running the caller's script: Python's `spawn` imports it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _train_here(spec, flag: StopFlag) -> Outcome:  # type: ignore[no-untyped-def]
    mark("config and checks")
    with own_run(spec.config, spec.run_dir) as ticket:
        clear_failures(spec.run_dir)
        spec = dataclasses.replace(spec, ticket=ticket)
        with refusing():
            opened = _open(spec)
        if opened.reached is not None:
            return _already_finished(spec, opened.reached)
        spec = dataclasses.replace(spec, record=opened.record)
        if spec.config.checkpoint.create_seed_checkpoint:
            with refusing():
                return write_seed_checkpoint(spec)
        if spec.layout.world_size > 1 or spec.config.launch.max_restarts > 0:
            return run_local(spec)
        try:
            return run_rank(spec, flag)
        finally:
            flag.defer(deferring=False)
