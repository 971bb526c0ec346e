"""Where the run's state comes from and when it is saved; the bytes are `checkpoint`'s business."""

import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from checkpoint.catalog import Catalog
from checkpoint.engine import load_tensors, resolve_foreign, save_step
from checkpoint.errors import CheckpointError
from checkpoint.lineage import Lineage, StartKind, StartPoint, start_point
from checkpoint.manifest import Manifest, read_manifest
from checkpoint.policy import SaveContext, SavePolicy, save_reasons
from checkpoint.retention import RetentionRule
from trainer.hook import Hook
from trainer.loop import Trainer
from trainer.state import TrainState

__all__ = ["CheckpointHook", "CheckpointPlan"]

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointPlan:
    """What the hook is told.

    Attributes:
        folder: holds the steps.
        policies: reasons to save; none of them: never save.
        rules: reasons to keep a step.
        lineages: the run's, the newest last.
        tracked: metrics whose best value is remembered, and whether lower is better.
        schedule_total: the steps of a schedule that begins on resume; None: up to the run's end.
        labels: written into each manifest: `data_fingerprint`, `config_hash`, `versions`.
    """

    folder: Path
    policies: Sequence[SavePolicy]
    rules: Sequence[RetentionRule]
    lineages: Sequence[Lineage]
    tracked: dict[str, bool]
    schedule_total: int | None
    labels: dict[str, Any]


@final
class CheckpointHook(Hook):
    """Resumes at the start and saves at the end of steps."""

    def __init__(self, plan: CheckpointPlan) -> None:
        self._plan = plan
        self._catalog = Catalog(plan.folder)
        self._saved_step = -1

    def restore(self, trainer: Trainer) -> None:
        choice: list[StartPoint | None] = [self._choose_start() if trainer.context.is_main else None]
        dist.broadcast_object_list(choice, group=trainer.context.save_group, group_src=0)
        start = choice[0]
        assert start is not None
        if start.kind is StartKind.fresh:
            source = "fresh weights"
        elif start.kind is StartKind.step:
            path = self._catalog.step_path(start.step)
            self._load(trainer, path, start)
            source = f"step {start.step} of {path}"
            self._saved_step = start.step if not start.exclude else -1
        else:
            assert start.path is not None
            path = resolve_foreign(Path(start.path))
            self._load(trainer, path, start)
            source = f"initial load from {path}" + (", model only" if start.model_only else "")
        if trainer.context.is_main:
            without = f", without {', '.join(start.exclude)}" if start.exclude else ""
            log.info("state: %s%s; continuing after step %d", source, without, trainer.state.step)

    def _choose_start(self) -> StartPoint:
        for line in self._catalog.tidy(self._plan.lineages):
            log.warning("%s", line)
        entries = self._catalog.entries(self._plan.lineages)
        return start_point(self._plan.lineages, [(e.step, e.manifest.lineage) for e in entries])

    def _load(self, trainer: Trainer, path: Path, start: StartPoint) -> None:
        tensors = model_tensors(trainer)
        if not start.model_only:
            if "optimizer" not in start.exclude:
                tensors |= optimizer_tensors(trainer)
            saved = TrainState.from_json(_train_state(path))
            total = self._plan.schedule_total
            trainer.state = saved.without(
                start.exclude, schedule_total=total or max(1, trainer.options.steps - saved.step)
            )
        load_tensors(path, tensors, trainer.context.save_group)

    def fit_start(self, trainer: Trainer) -> None:
        trainer.last_save_clock = time.monotonic()

    def step_end(self, trainer: Trainer) -> None:
        state, best = trainer.state, dict(trainer.state.best)
        self._track(state, trainer.measured)
        context = SaveContext(
            step=state.step,
            last_step=trainer.options.steps,
            stopping=trainer.stop is not None,
            seconds_since_save=trainer.seconds_since_save,
            metrics=trainer.measured,
            best=best,
        )
        reasons = save_reasons(self._plan.policies, context)
        if reasons:
            self._save(trainer, reasons)

    def _track(self, state: TrainState, measured: dict[str, float]) -> None:
        for name, lower in self._plan.tracked.items():
            value, best = measured.get(name), state.best.get(name)
            if value is not None and value == value and (best is None or (value < best) == lower):
                state.best[name] = value

    def _save(self, trainer: Trainer, reasons: list[str]) -> None:
        trainer.flush()
        started, step = time.perf_counter(), trainer.state.step
        for hook in trainer.hooks:
            hook.before_commit(trainer, step)
        manifest = Manifest(
            step=step,
            lineage=self._plan.lineages[-1].id,
            train_state=trainer.state.as_json(),
            metrics=dict(trainer.measured),
            layout=trainer.context.layout.as_dict(),
            **self._plan.labels,
        )
        tensors = model_tensors(trainer) | optimizer_tensors(trainer) | _state_tensors(trainer.state)
        path = save_step(self._plan.folder, tensors, manifest, trainer.context.save_group)
        self._saved_step = step
        trainer.last_save_clock, trainer.seconds_since_save = time.monotonic(), 0.0
        if trainer.context.is_main:
            took = time.perf_counter() - started
            log.info("saved %s in %.2f s (%s)", path, took, ", ".join(reasons))
            removed = self._catalog.prune(self._plan.rules, self._plan.lineages)
            if removed:
                log.info("removed steps %s", ", ".join(str(s) for s in removed))
        for hook in trainer.hooks:
            hook.on_committed(trainer, step)


def model_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Parameters and persistent buffers by their own names; tied ones once."""
    tensors = dict(trainer.model.named_parameters())
    persistent = trainer.model.state_dict().keys()
    return {
        **{n: p.detach() for n, p in tensors.items()},
        **{n: b for n, b in trainer.model.named_buffers() if n in persistent},
    }


def optimizer_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """The optimizer's state below `optimizer.`."""
    return {f"optimizer.{name}": tensor for name, tensor in trainer.optimizer.state_tensors().items()}


def _state_tensors(state: TrainState) -> dict[str, Tensor]:
    """The counters for readers of plain DCP; ours come from the manifest."""
    counters = {k: v for k, v in state.as_json().items() if isinstance(v, int)}
    return {f"train_state.{name}": torch.tensor(value) for name, value in counters.items()}


def _train_state(path: Path) -> dict[str, Any]:
    try:
        return read_manifest(path).train_state
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} has no manifest and so no train state; use checkpoint.initial_load_model_only=true"
        ) from error
