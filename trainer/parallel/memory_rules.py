"""What is compiled, recomputed and resharded: options with an `auto`, and what they ask for. Pure."""

from collections.abc import Iterator

from regrow.trainer.config import ParallelConfig, PrecisionName, TrainConfig
from regrow.trainer.parallel.layout import Layout, divisors_of
from regrow.trainer.parallel.stages import SPLIT_BACKWARD

__all__ = ["chosen_blocks", "compiles", "memory_problems", "reshard_choice"]


def compiles(
    train: TrainConfig, parallel: ParallelConfig, precision: PrecisionName, device_type: str, *, can_compile: bool
) -> bool:
    """Whether blocks are compiled; `auto` compiles on GPUs what can be compiled there.

    Float64 is there for checking numerics and stays as it is written.

    Args:
        train: says `true`, `false` or `auto`.
        parallel: the degrees and their options.
        precision: of the computation.
        device_type: `cpu` or `cuda`.
        can_compile: whether the compiler finds what it needs on this machine.
    """
    if isinstance(train.compile, bool):
        return train.compile
    split = parallel.pp > 1 and parallel.pp_schedule in SPLIT_BACKWARD
    return device_type == "cuda" and can_compile and not split and precision is not PrecisionName.fp64


def reshard_choice(parallel: ParallelConfig, pp: int, ranks: int) -> bool | int | None:
    """What FSDP is told to do between a unit's forward and backward pass; None is its own default.

    Args:
        parallel: says what is wanted.
        pp: the pipeline's degree.
        ranks: that share the unit's parameters.
    """
    option = parallel.reshard_after_forward
    if option == "auto":
        # Under a pipeline many micro-batches pass a stage one by one; what is gathered stays for all of them.
        return None if pp == 1 else False
    if isinstance(option, bool):
        return option
    assert isinstance(option, int), "refused before any rank starts"
    if option == 1:
        return False
    # Experts may be shared among fewer ranks than the rest.
    return option if option < ranks and ranks % option == 0 else True


def chosen_blocks(count: int, budget: float) -> list[int]:
    """Which of so many blocks are computed again, spread evenly, where `budget` of the blocks are kept.

    Args:
        count: the blocks.
        budget: from 0 (all are computed again) to 1 (none).
    """
    share = 1.0 - budget
    # Rounded to nine digits, so that a tenth of ten blocks is one.
    ends = [int(round(share * i, 9)) for i in range(count + 1)]
    return [i for i in range(count) if ends[i + 1] > ends[i]]


def memory_problems(layout: Layout, parallel: ParallelConfig, train: TrainConfig) -> Iterator[str]:
    """What is out of its range, a sentence each.

    Args:
        layout: the degrees.
        parallel: their options.
        train: recomputation and compilation.
    """
    if not isinstance(train.compile, bool) and train.compile != "auto":
        yield f"train.compile must be auto, true or false, but is {train.compile}; use auto"
    if not 0 <= train.activation_memory_budget <= 1:
        yield (
            "train.activation_memory_budget must be within 0 and 1, but is "
            f"{train.activation_memory_budget:g}; use 0.5"
        )
    yield from _resharding(layout, parallel)


def _resharding(layout: Layout, parallel: ParallelConfig) -> Iterator[str]:
    option, ranks = parallel.reshard_after_forward, layout.dp_shard * layout.cp
    if isinstance(option, bool):
        if option and layout.pp > 1 and parallel.pp_schedule in SPLIT_BACKWARD:
            yield (
                f"parallel.reshard_after_forward must not be true with parallel.pp_schedule="
                f"{parallel.pp_schedule.name}, whose backward pass needs the gathered parameters; use auto"
            )
    elif isinstance(option, int):
        if layout.pp > 1:
            yield (
                "parallel.reshard_after_forward must be auto, true or false with parallel.pp above 1, but is "
                f"{option}; use auto"
            )
        elif option < 1 or ranks % option:
            yield (
                "parallel.reshard_after_forward must divide the ranks that share parameters, dp_shard · cp "
                f"({ranks}), but is {option}; use auto or {divisors_of(ranks)}"
            )
    elif option != "auto":
        yield (
            "parallel.reshard_after_forward must be auto, true, false or a number of ranks, but is "
            f"{option}; use auto"
        )
