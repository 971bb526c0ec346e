"""Dry runs of deep models from two of shallow ones: blocks are alike, so every part of the step grows in a line."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import torch

from regrow.models.base import LanguageModel
from regrow.models.config import DecoderConfig
from regrow.trainer.config import ActivationCheckpoint
from regrow.trainer.optimizer import Optimizer
from regrow.trainer.parallel.stages import plan_stages, stages_per_rank
from regrow.trainer.plan.dry_run import DryRun, Step, dry_run
from regrow.trainer.plan.live_bytes import Kind, Peak

__all__ = ["dry_run_of_all_layers"]

MakeModel = Callable[[DecoderConfig], LanguageModel]
MakeOptimizer = Callable[[LanguageModel], Optimizer]
# Layers of a stage in the shallow models: a first and a last one, and one or two between.
_FEW, _MORE = 3, 4


def dry_run_of_all_layers(
    step: Step, rank: int, make_model: MakeModel, make_optimizer: MakeOptimizer, *, whole: bool = False
) -> DryRun:
    """As `dry_run`, in seconds for any depth.

    Args:
        step: see `dry_run`, as of those up to `make_optimizer`.
        rank: among all ranks.
        make_model: of a config.
        make_optimizer: of a model.
        whole: run all layers whatever that takes.
    """
    layers = _layers_of_rank(step, rank)
    if whole or max(layers) <= _MORE or not _alike(step, make_model):
        return dry_run(step, rank, make_model, make_optimizer)
    few, more = (dry_run(_shallow(step, n), rank, make_model, make_optimizer) for n in (_FEW, _MORE))
    # Stages of a rank may differ by a layer.
    share = (sum(layers) / len(layers) - _FEW) / (_MORE - _FEW)
    return DryRun(
        peaks={name: _line(peak, more.peaks[name], share) for name, peak in few.peaks.items()},
        parameters=round(few.parameters + share * (more.parameters - few.parameters)),
        held=_counter_line(few.held, more.held, share),
    )


def _layers_of_rank(step: Step, rank: int) -> list[int]:
    """Layers of each stage of the rank."""
    layout = step.layout
    plan = plan_stages(step.parallel, layout.pp, step.model.n_layers, rank // (layout.world_size // layout.pp))
    return [len(plan.layers[number]) for number in plan.mine]


def _alike(step: Step, make_model: MakeModel) -> bool:
    """Whether all blocks have the same parameters; with a budget, those computed again do not lie evenly."""
    if step.train.activation_checkpoint is ActivationCheckpoint.budget:
        return False
    with torch.device("meta"):
        blocks = make_model(step.model).blocks()
    shapes = [[(n, p.shape) for n, p in block.named_parameters()] for block in blocks]
    return all(one == shapes[0] for one in shapes)


def _shallow(step: Step, layers: int) -> Step:
    stages = step.layout.pp * stages_per_rank(step.parallel) if step.layout.pp > 1 else 1
    parallel = replace(step.parallel, pp_layers=[layers] * stages) if stages > 1 else step.parallel
    return replace(step, model=replace(step.model, n_layers=layers * stages), parallel=parallel)


def _line(few: Peak, more: Peak, share: float) -> Peak:
    return Peak(
        size=round(few.size + share * (more.size - few.size)), kinds=_counter_line(few.kinds, more.kinds, share)
    )


def _counter_line(few: Counter[Kind], more: Counter[Kind], share: float) -> Counter[Kind]:
    return Counter({kind: round(few[kind] + share * (more[kind] - few[kind])) for kind in Kind})
