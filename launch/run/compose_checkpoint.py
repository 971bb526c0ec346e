"""Saving, restoring and exporting, as a run's config asks for them."""

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
from regrow.launch.run.weights import shapes_of
from regrow.trainer.hook import Hook
from regrow.trainer.hooks.checkpoint import CheckpointHook, CheckpointPlan
from regrow.trainer.hooks.export import ExportHook, ExportPlan
from regrow.trainer.hooks.last_save import LastSave

__all__ = ["checkpoint_hooks"]


def checkpoint_hooks(spec: RankSpec, fingerprint: str) -> list[Hook]:
    config, record = spec.config, spec.record
    assert record is not None, "the launcher opens the run before any rank starts"
    options, folder = config.checkpoint, checkpoint_folder(config, spec.run_dir)
    hooks: list[Hook] = []
    if options.export.every_n and policies(options):
        hooks.append(
            ExportHook(
                ExportPlan(
                    every_n=options.export.every_n,
                    checkpoints=folder,
                    folder=export_folder(spec.run_dir),
                    export=hf_export(config, spec.run_dir),
                    lineages=record.lineages,
                )
            )
        )
    plan = CheckpointPlan(
        folder=folder,
        policies=policies(options),
        storage_options=options.storage_options,
        rules=rules(options),
        lineages=record.lineages,
        tracked=tracked_metrics(options),
        schedule_total=config.scheduler.total_steps,
        stretched=record.stretched(),
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
        initial=LoadRules.from_config(options),
        open_initial=lambda path: open_initial(config, path).source,
        parameters=lambda: shapes_of(config.model).keys(),
    )
    return [*hooks, CheckpointHook(plan)]
