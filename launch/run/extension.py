"""Going on beyond the end of a learning-rate schedule: what the command means, and what is recorded of it."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from regrow.checkpoint.documents import DocumentError, convert_document
from regrow.checkpoint.errors import CheckpointError
from regrow.checkpoint.format.manifest import Manifest, read_manifest
from regrow.checkpoint.format.stored_step import StoredStep
from regrow.checkpoint.load.initial_load import pin_source
from regrow.checkpoint.load.loading import is_verified
from regrow.checkpoint.policy.lineage import StartKind, StartPoint
from regrow.checkpoint.storage.opening import open_storage
from regrow.launch.config.errors import UserError
from regrow.launch.config.schema import Config
from regrow.launch.run.build import build_schedule
from regrow.trainer.run_record import Extend, Extension, RunRecord
from regrow.trainer.state import TrainState

__all__ = ["Span", "decide_extension", "say_where_it_stands", "settle_schedule"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """A schedule in a run.

    Attributes:
        origin: the step at which it began.
        total: the steps that it spans.
        step: the run goes on after this step.
    """

    origin: int
    total: int
    step: int = 0

    @property
    def end(self) -> int:
        """Its last step."""
        return self.origin + self.total


def settle_schedule(config: Config, record: RunRecord, start: StartPoint, entries: Sequence[StoredStep]) -> None:
    """Settles which schedule the run goes on with, and records it where it is not the one that the run had.

    Args:
        config: the command's.
        record: the run's, with the lineage that is about to be trained; an extension is added to it.
        start: where that begins.
        entries: the line's committed steps.

    Raises:
        UserError: many steps would be trained beyond the schedule's end, and nobody has said that they should.
    """
    known = record.visible_extensions()
    span = _span(config, start, _manifest(config, start, entries), known)
    if config.checkpoint.create_seed_checkpoint or config.train.steps <= span.step:
        return
    extension = decide_extension(
        span,
        config.train.steps,
        config.run.extend,
        known,
        lineage=record.lineages[-1].id,
        explicit=config.scheduler.total_steps is not None,
    )
    if extension is not None:
        record.extensions.append(extension)
        span = Span(origin=span.origin, total=extension.total, step=span.step)
        log.warning(
            "run.extend=%s: from step %d on the learning-rate schedule ends at step %d, of %d to train",
            extension.mode.value,
            span.step + 1,
            span.end,
            config.train.steps,
        )
    elif config.train.steps > span.end:
        log.info(
            "the learning-rate schedule ends at step %d and stays at its floor up to step %d",
            span.end,
            config.train.steps,
        )
    problem = build_schedule(config).shortened(span.total)
    if problem is not None:
        log.warning("%s", problem)


def decide_extension(
    span: Span, steps: int, mode: Extend, known: Sequence[Extension], *, lineage: str, explicit: bool
) -> Extension | None:
    """What is to be recorded where a run goes on; None where nothing is new. Pure.

    Args:
        span: the schedule that the run goes on with.
        steps: to train in all.
        mode: `run.extend`.
        known: what was recorded of this line of steps before.
        lineage: that goes on.
        explicit: the schedule's length is `scheduler.total_steps`, and so chosen knowingly.

    Raises:
        UserError: more than 1 % of the schedule's steps (or one) would follow its end, and nothing says what for.
    """
    beyond = steps - span.end
    if beyond <= 0:
        return None
    if explicit:
        if mode is Extend.stretch:
            raise UserError(
                f"run.extend must not be 'stretch' where scheduler.total_steps is set ({span.total}), but is; use "
                f"scheduler.total_steps={steps - span.origin} and run.allow_change=[scheduler.total_steps] instead"
            )
        return None
    held = any(
        e.mode is Extend.hold and (e.origin, e.total) == (span.origin, span.total) and e.steps >= steps for e in known
    )
    if mode is Extend.refuse:
        if beyond > max(1.0, 0.01 * span.total) and not held:
            raise UserError(_refusal(span, steps, beyond))
        return None
    if mode is Extend.hold and held:
        return None
    total = span.total if mode is Extend.hold else steps - span.origin
    return Extension(lineage=lineage, after_step=span.step, mode=mode, origin=span.origin, total=total, steps=steps)


def _refusal(span: Span, steps: int, beyond: int) -> str:
    return (
        f"train.steps must be at most {span.end}, where this run's learning-rate schedule ends, but is {steps}: "
        f"{beyond} steps would be trained at the schedule's floor; add run.extend=stretch to span all {steps} steps "
        f"from step {span.step + 1} on, or run.extend=hold to stay at the floor, or start afresh with another "
        "run.name or run.resume=never"
    )


def _span(config: Config, start: StartPoint, manifest: Manifest | None, known: Sequence[Extension]) -> Span:
    """The schedule as the ranks will have it once they have loaded their state."""
    total, steps = config.scheduler.total_steps, config.train.steps
    if manifest is None:
        return Span(origin=0, total=total or steps)
    try:
        stored = convert_document(manifest.train_state, TrainState)
    except DocumentError as error:
        raise CheckpointError(
            f"{start.path or f'step {start.step}'} must hold a train state, but does not ({error}); use another step"
        ) from error
    state = stored.without(start.exclude, schedule_total=total or max(1, steps - stored.step))
    stretched = {e.origin: e.total for e in known if e.mode is Extend.stretch}
    found = total or stretched.get(state.schedule_origin, state.schedule_total)
    return Span(origin=state.schedule_origin, total=found, step=state.step)


def _manifest(config: Config, start: StartPoint, entries: Sequence[StoredStep]) -> Manifest | None:
    """Of the step whose train state the run goes on with; None where it begins with a state of its own."""
    if start.kind is StartKind.step:
        found = next((e.manifest for e in entries if e.step == start.step), None)
        return None if found is None or found.kind == "model" else found
    if start.kind is StartKind.initial and not start.model_only:
        assert start.path is not None
        place = pin_source(open_storage(start.path, config.checkpoint.storage_options))
        # Others' state has no schedule of ours: it begins with the run.
        manifest = read_manifest(place, check_files=False) if is_verified(place) else None
        return manifest if manifest is not None and manifest.train_state else None
    return None


def say_where_it_stands(config: Config, step: int, entries: Sequence[StoredStep]) -> None:
    """Logs that nothing is left to train, and at which step the run is."""
    steps = config.train.steps
    if step <= steps:
        return
    earlier = [e.step for e in entries if e.step <= steps]
    back = f", or go back with checkpoint.load_step={earlier[-1]}" if earlier else ""
    log.warning(
        "the run is at step %d already; train.steps=%d leaves nothing to train: give more than %d to go on%s",
        step,
        steps,
        step,
        back,
    )
