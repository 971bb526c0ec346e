"""What a run is told about its checkpoints, from its config."""

import os

import torch

from regrow.checkpoint.load.initial_load import LoadRules
from regrow.checkpoint.save.saver import SaverOptions
from regrow.launch.run.build import (
    checkpoint_folder,
    export_folder,
    hf_export,
    open_initial,
    policies,
    rules,
    tracked_metrics,
)
from regrow.launch.run.labels import run_labels
from regrow.launch.run.rank_spec import RankSpec
from regrow.launch.run.weights import shapes_of, vocabulary_of
from regrow.trainer.checkpoint_plans import CheckpointPlan, ExportPlan, LastSave, RestorePlan
from regrow.trainer.restore import Restorer

__all__ = ["compose_checkpoint", "compose_export", "compose_restorer"]


def compose_restorer(spec: RankSpec) -> Restorer:
    """Finds the state that a run goes on from."""
    config, record = spec.config, spec.record
    assert record is not None, "the launcher opens the run before any rank starts"
    options = config.checkpoint
    return Restorer(
        RestorePlan(
            folder=checkpoint_folder(config, spec.run_dir),
            storage_options=options.storage_options,
            lineages=record.lineages,
            schedule_total=config.scheduler.total_steps,
            stretched=record.stretched(),
            initial=LoadRules.from_config(options, vocabulary_of(config.model)),
            open_initial=lambda path: open_initial(config, path).source,
            parameters=lambda: shapes_of(config.model).keys(),
            reader_timeout_s=options.lease_timeout_s,
            ticket=spec.ticket,
            exports=export_folder(spec.run_dir),
        )
    )


def compose_checkpoint(spec: RankSpec, fingerprint: str) -> CheckpointPlan:
    """When and how a run is saved.

    Args:
        spec: of the run.
        fingerprint: of its data.
    """
    config, record = spec.config, spec.record
    assert record is not None, "the launcher opens the run before any rank starts"
    options = config.checkpoint
    return CheckpointPlan(
        folder=checkpoint_folder(config, spec.run_dir),
        policies=policies(options),
        rules=rules(options),
        lineages=record.lineages,
        tracked=tracked_metrics(options),
        labels=run_labels(spec, fingerprint),
        mode=options.async_mode,
        saver=SaverOptions(
            files_per_rank=options.files_per_rank,
            commit_timeout_s=options.commit_timeout_s,
            ticket=spec.ticket,
        ),
        when_busy=options.when_busy,
        reader_timeout_s=options.lease_timeout_s,
        stop_on_error=options.on_save_error.value == "stop",
        max_failures=options.max_save_errors,
        grace_s=float(os.environ.get("REGROW_GRACE_S", "inf")),
        last=LastSave(
            model_only=options.last_save_model_only,
            dtype=getattr(torch, options.export_dtype.name),
            export=hf_export(config, spec.run_dir) if options.last_save_in_hf else None,
            folder=export_folder(spec.run_dir),
        ),
    )


def compose_export(spec: RankSpec) -> ExportPlan | None:
    """What is exported while training goes on; None where nothing is."""
    config, record = spec.config, spec.record
    assert record is not None, "the launcher opens the run before any rank starts"
    if not config.checkpoint.export.every_n or not policies(config.checkpoint):
        return None
    return ExportPlan(
        every_n=config.checkpoint.export.every_n,
        checkpoints=checkpoint_folder(config, spec.run_dir),
        folder=export_folder(spec.run_dir),
        export=hf_export(config, spec.run_dir),
        lineages=record.lineages,
    )
