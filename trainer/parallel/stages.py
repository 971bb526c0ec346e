"""Which layers make a stage of the pipeline, and which rank holds it: arithmetic alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from regrow.trainer.config import ParallelConfig, PipelineSchedule

__all__ = ["SPLIT_BACKWARD", "StagePlan", "plan_stages", "split_layers", "stages_per_rank"]

_SEVERAL = {
    PipelineSchedule.interleaved,
    PipelineSchedule.interleaved_zero_bubble,
    PipelineSchedule.zbv_zero_bubble,
}
# Schedules whose backward pass runs in two halves.
SPLIT_BACKWARD = (PipelineSchedule.interleaved_zero_bubble, PipelineSchedule.zbv_zero_bubble)


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan:
    """The stages of one rank.

    Attributes:
        layers: of each stage of the whole pipeline.
        mine: numbers of this rank's stages, in order.
        ranks: the rank, along the pp axis, of each stage.
    """

    layers: tuple[tuple[int, ...], ...]
    mine: tuple[int, ...]
    ranks: tuple[int, ...]

    @property
    def count(self) -> int:
        """Stages in all."""
        return len(self.layers)


def stages_per_rank(parallel: ParallelConfig) -> int:
    """Stages on each rank, with the schedule's default filled in."""
    return parallel.pp_stages_per_rank or (2 if parallel.pp_schedule in _SEVERAL else 1)


def split_layers(n_layers: int, stages: int, *, input_weight: int, output_weight: int) -> list[int]:
    """Layers of each stage so that stages weigh as evenly as whole layers allow, at least 1 each.

    The embedding counts `input_weight` layers and the output `output_weight`.
    """
    sizes = [1] * stages
    weights = [1] * stages
    weights[0] += input_weight
    weights[-1] += output_weight
    for _ in range(n_layers - stages):
        lightest = min(range(stages), key=lambda s: weights[s])
        sizes[lightest] += 1
        weights[lightest] += 1
    return sizes


def plan_stages(parallel: ParallelConfig, pp: int, n_layers: int, rank: int) -> StagePlan:
    """The stages and where they are; the values have been checked.

    Args:
        parallel: the config.
        pp: the pipeline's degree.
        n_layers: of the model.
        rank: this rank's coordinate along the pp axis.
    """
    count = pp * stages_per_rank(parallel) if pp > 1 else 1
    sizes: Sequence[int] = (pp > 1 and parallel.pp_layers) or split_layers(
        n_layers, count, input_weight=parallel.pp_input_weight, output_weight=parallel.pp_output_weight
    )
    layers, first = [], 0
    for size in sizes:
        layers.append(tuple(range(first, first + size)))
        first += size
    if parallel.pp_schedule is PipelineSchedule.zbv_zero_bubble:
        ranks = tuple(s if s < pp else 2 * pp - 1 - s for s in range(count))
    else:
        ranks = tuple(s % pp for s in range(count))
    mine = tuple(s for s in range(count) if ranks[s] == rank)
    return StagePlan(layers=tuple(layers), mine=mine, ranks=ranks)
