"""What a run is told about its checkpoints: where it starts from, when and how it saves, what it exports."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from regrow.checkpoint.config import AsyncMode, WhenBusy
from regrow.checkpoint.format.tensor_source import TensorSource
from regrow.checkpoint.load.initial_load import LoadRules
from regrow.checkpoint.policy.lineage import Lineage
from regrow.checkpoint.policy.retention import RetentionRule
from regrow.checkpoint.policy.save import SavePolicy
from regrow.checkpoint.run.lease import FencingToken
from regrow.checkpoint.save.progress import SaveProgress
from regrow.checkpoint.save.saver import SaverOptions
from regrow.checkpoint.storage.base import Storage
from regrow.trainer.hf_folder import HfExport

__all__ = ["CheckpointPlan", "ExportPlan", "LastSave", "RestorePlan"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LastSave:
    """The last step's save.

    Attributes:
        model_only: weights alone.
        dtype: of the weights, where they are saved alone.
        export: makes it a Hugging Face folder, and no checkpoint.
        folder: receives that folder.
    """

    model_only: bool
    dtype: torch.dtype
    export: HfExport | None
    folder: Path

    @property
    def is_full(self) -> bool:
        """Whether it is like any other save."""
        return not self.model_only and self.export is None


@dataclass(frozen=True, kw_only=True, slots=True)
class RestorePlan:
    """Where a run's state comes from.

    Attributes:
        folder: holds the steps.
        storage_options: for a URL to start from.
        lineages: the run's, the newest last.
        schedule_total: the steps of a schedule that begins on resume; None: up to the run's end.
        stretched: by `run.extend`: the step at which a schedule began, the step after which it was stretched, and the
            steps that it spans since; oldest first.
        initial: how names and shapes may differ where the run starts from weights elsewhere.
        open_initial: opens such weights under our names, given their path or URL.
        parameters: the names of all of the model's parameters, on whichever rank.
        reader_timeout_s: after which a silent reader of a step does not keep it any more.
        ticket: of the lease on the folder; None where nobody else can write there.
        exports: the run's Hugging Face folders.
    """

    folder: Storage
    storage_options: dict[str, str]
    lineages: Sequence[Lineage]
    schedule_total: int | None
    stretched: Sequence[tuple[int, int, int]]
    initial: LoadRules
    open_initial: Callable[[str], TensorSource]
    parameters: Callable[[], Collection[str]]
    reader_timeout_s: float
    ticket: FencingToken | None
    exports: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointPlan:
    """When and how a run is saved.

    Attributes:
        folder: holds the steps.
        policies: reasons to save; none of them: never save.
        rules: reasons to keep a step.
        lineages: the run's, the newest last.
        tracked: metrics whose best value is remembered, and whether lower is better.
        labels: written into each manifest: `data_fingerprint`, `config_hash`, `versions`.
        mode: how a save overlaps training.
        saver: how saves are made.
        when_busy: what becomes of a save that is due during another.
        reader_timeout_s: after which a silent reader of a step does not keep it any more.
        stop_on_error: a save that fails ends the run.
        max_failures: so many in a row end it in any case.
        grace_s: between a request to stop and the kill; infinite where nobody kills.
        last: what the last step's save is.
        progress: how far the save in flight is.
    """

    folder: Storage
    policies: Sequence[SavePolicy]
    rules: Sequence[RetentionRule]
    lineages: Sequence[Lineage]
    tracked: dict[str, bool]
    labels: dict[str, Any]
    mode: AsyncMode
    saver: SaverOptions
    when_busy: WhenBusy
    reader_timeout_s: float
    stop_on_error: bool
    max_failures: int
    last: LastSave
    grace_s: float = math.inf
    progress: SaveProgress = field(default_factory=SaveProgress)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportPlan:
    """What is exported while training goes on.

    Attributes:
        every_n: steps between exports.
        checkpoints: the run's checkpoint folder.
        folder: receives `step-N` folders.
        export: what goes into them beside the weights.
        lineages: the run's.
    """

    every_n: int
    checkpoints: Storage
    folder: Path
    export: HfExport
    lineages: Sequence[Lineage]
