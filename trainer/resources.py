"""What hooks may need of the run, beside the trainer itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from regrow.trainer.checkpoint_plans import CheckpointPlan, ExportPlan
from regrow.trainer.data.samples import Samples
from regrow.trainer.run_record import Attempt

__all__ = ["BannerLines", "Resources", "Started"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """Where a start goes on, for its banner.

    Attributes:
        source: of the state, in words.
        step: the last that is done.
        schedule_total: the steps that the learning-rate schedule spans.
        step_bytes: of a checkpoint; 0 for a run without them.
    """

    source: str
    step: int
    schedule_total: int
    step_bytes: int


BannerLines = Callable[[Started], Sequence[str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """`trainer.resources`: composed once, when the run starts.

    Attributes:
        run_dir: the run's directory.
        run_name: `run.name`.
        sweep: the sweep's name, if any.
        config: the whole config as plain values.
        tokenizer: of the data.
        validation: held-out samples by name, which may be none: those of the split, whose name is empty, and those of
            further sets.
        micro_batch_size: rows of a forward pass.
        document_mask: whether attention stays within documents.
        begin: writes what this start changes in the run's directory; called by rank 0 alone, once the state is
            loaded.
        banner: what the start says of the run.
        attempt: what `run.json` is to say of this start, as far as it is known before it.
        checkpoint: how the run is saved; None where it has no checkpoints.
        failed: writes down why a rank has failed, for the run's end to tell.
        export: what is exported while training goes on; None where nothing is.
    """

    run_dir: Path
    run_name: str
    sweep: str | None
    config: dict[str, Any]
    tokenizer: Tokenizer
    validation: dict[str, Samples]
    micro_batch_size: int
    document_mask: bool
    begin: Callable[[], None]
    banner: BannerLines
    attempt: Attempt
    failed: Callable[[int, str], None]
    checkpoint: CheckpointPlan | None
    export: ExportPlan | None
