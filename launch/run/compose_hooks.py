"""The one ordered list of hooks, and what they are given of the run."""

import logging
import os
import platform
from functools import partial

from regrow.launch.config.schema import Config
from regrow.launch.run.banner import banner_of
from regrow.launch.run.build import build_hooks
from regrow.launch.run.compose_checkpoint import compose_checkpoint, compose_export
from regrow.launch.run.compose_data import validation_samples
from regrow.launch.run.failures import note_sentence
from regrow.launch.run.ownership import lease_place
from regrow.launch.run.rank_spec import RankSpec
from regrow.launch.run.run_documents import begin_run
from regrow.launch.run.versions import software_versions
from regrow.trainer.data.corpus import Corpus
from regrow.trainer.data.tokenizer import load_tokenizer
from regrow.trainer.hook import Hook
from regrow.trainer.parallel.context import ParallelContext
from regrow.trainer.resources import Resources
from regrow.trainer.run_record import Attempt
from regrow.trainer.wording import FILE_ONLY

__all__ = ["compose_hooks", "compose_resources"]

log = logging.getLogger(__name__)


def compose_hooks(config: Config, context: ParallelContext) -> list[Hook]:
    """The hooks in the order in which they run, which the log's file of rank 0 has."""
    hooks = build_hooks(config)
    if context.is_main:
        names = ", ".join(type(h).__name__ for h in hooks)
        log.info("hooks, in order: %s", names, extra={FILE_ONLY: True})
    return hooks


def compose_resources(spec: RankSpec, context: ParallelContext, threads: int, corpus: Corpus) -> Resources:
    """What hooks may need of the run.

    Args:
        spec: of the run.
        context: this rank's place.
        threads: of this rank.
        corpus: the run's tokens.
    """
    config = spec.config
    saves = config.checkpoint.enable
    return Resources(
        run_dir=spec.run_dir,
        run_name=config.run.name,
        sweep=spec.sweep,
        config=spec.config_dict,
        tokenizer=load_tokenizer(corpus.tokenizer_file),
        validation=validation_samples(config, corpus, spec.validation_folders),
        micro_batch_size=config.data.micro_batch_size,
        document_mask=config.data.document_mask,
        begin=partial(_begin, spec),
        banner=banner_of(spec, context, corpus, threads),
        attempt=_attempt(context, threads),
        failed=partial(note_sentence, spec.run_dir),
        checkpoint=compose_checkpoint(spec, corpus.fingerprint) if saves else None,
        export=compose_export(spec) if saves else None,
    )


def _begin(spec: RankSpec) -> None:
    """Writes what this start changes in the run.

    Raises:
        LeaseLostError: another launcher has taken the run over meanwhile.
    """
    assert spec.record is not None, "the launcher opens the run before any rank starts"
    if spec.ticket is not None:
        spec.ticket.check_not_taken(lease_place(spec.config, spec.run_dir))
    begin_run(spec.config_dict, spec.run_dir, Corpus(spec.data_folders), spec.overrides, spec.record)


def _attempt(context: ParallelContext, threads: int) -> Attempt:
    return Attempt(
        job=os.environ.get("SLURM_JOB_ID"),
        host=platform.node(),
        layout=context.layout.as_dict(),
        threads=threads,
        versions=software_versions(),
    )
