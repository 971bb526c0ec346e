"""All hooks of a run, in their order."""

import logging
import os
import platform
from functools import partial

from regrow.launch.run.build import build_hooks, uses_wandb
from regrow.launch.run.compose_checkpoint import checkpoint_hooks
from regrow.launch.run.rank_spec import RankSpec
from regrow.launch.run.run_dir import begin_run, lease_place
from regrow.launch.run.versions import software_versions
from regrow.trainer.data.token_store import TokenStore
from regrow.trainer.hook import Hook
from regrow.trainer.hooks.begin import BeginHook
from regrow.trainer.hooks.metrics import MetricsHook, SamplesHook
from regrow.trainer.hooks.progress import ProgressHook
from regrow.trainer.hooks.record import RecordHook
from regrow.trainer.hooks.startup import StartupHook
from regrow.trainer.hooks.wandb import WandbHook
from regrow.trainer.parallel.context import ParallelContext
from regrow.trainer.run_record import Attempt

__all__ = ["compose_hooks"]

log = logging.getLogger(__name__)


def compose_hooks(spec: RankSpec, context: ParallelContext, threads: int, fingerprint: str) -> list[Hook]:
    """All hooks in the order in which they run; the checkpoint is last, when the step's rows are written."""
    config = spec.config
    hooks: list[Hook] = [BeginHook(partial(_begin, spec)), *build_hooks(config), MetricsHook()]
    if config.data.log_samples:
        hooks.append(SamplesHook())
    hooks.append(ProgressHook(config.train.log_every))
    if uses_wandb(config):
        hooks.append(WandbHook(config.wandb, config.run.name, spec.config_dict, spec.sweep))
    hooks.append(RecordHook(_attempt(context, threads)))
    if config.checkpoint.enable:
        hooks += checkpoint_hooks(spec, fingerprint)
    hooks.append(StartupHook())
    if context.is_main:
        log.info("hooks, in order: %s", ", ".join(type(h).__name__ for h in hooks))
    return hooks


def _begin(spec: RankSpec) -> None:
    """Writes what this start changes in the run.

    Raises:
        LeaseLostError: another launcher has taken the run over meanwhile.
    """
    assert spec.record is not None, "the launcher opens the run before any rank starts"
    if spec.ticket is not None:
        spec.ticket.check_not_taken(lease_place(spec.config, spec.run_dir))
    begin_run(spec.config_dict, spec.run_dir, TokenStore(spec.data_folder), spec.overrides, spec.record)


def _attempt(context: ParallelContext, threads: int) -> Attempt:
    return Attempt(
        job=os.environ.get("SLURM_JOB_ID"),
        host=platform.node(),
        layout=context.layout.as_dict(),
        threads=threads,
        versions=software_versions(),
    )
