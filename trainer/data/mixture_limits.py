"""How long the sources of a mixture last: what a run takes of each, and what happens when one is used up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from math import ceil, inf
from typing import Literal

from regrow.trainer.data.mixture import Mixture, Stage
from regrow.trainer.data.source import DataError

__all__ = ["Supply", "Use", "limited", "use_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Supply:
    """What a source has to give.

    Attributes:
        windows: samples an epoch.
        max_epochs: epochs that a run may take; parts of one count, rounded down to whole windows; None or 0 is
            without end.
    """

    windows: int
    max_epochs: float | None = None

    @property
    def limit(self) -> int | None:
        """Samples that a run may take; None: without end."""
        if not self.max_epochs:
            return None
        return int(self.windows * Fraction(Decimal(str(self.max_epochs))))


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """What a run takes of a source in a stage.

    Attributes:
        stage: its number.
        first_sample: samples of the run before the stage.
        last_sample: samples of the run up to the stage's end.
        source: its name.
        weight: its share in the stage.
        samples: how many of the stage's are this source's.
        tokens: in these samples.
        epochs: in these samples.
        epochs_so_far: in all samples of the source up to the stage's end.
    """

    stage: int
    first_sample: int
    last_sample: int
    source: str
    weight: Fraction
    samples: int
    tokens: int
    epochs: float
    epochs_so_far: float


def use_of(mixture: Mixture, samples: int, windows: Mapping[str, int], seq_len: int) -> list[Use]:
    """What a run takes, by stage and source; sources without a weight in a stage are left out.

    Args:
        mixture: the sources' order.
        samples: of the whole run.
        windows: by source, samples an epoch.
        seq_len: tokens a sample.
    """
    rows = []
    starts = [stage.first_sample for stage in mixture.stages if stage.first_sample < samples]
    for number, (first, last) in enumerate(zip(starts, [*starts[1:], samples], strict=True)):
        before, after = mixture.counts(first).tolist(), mixture.counts(last).tolist()
        for source, (name, weight) in enumerate(zip(mixture.names, mixture.stages[number].weights, strict=True)):
            if weight > 0:
                taken = after[source] - before[source]
                rows.append(
                    Use(
                        stage=number,
                        first_sample=first,
                        last_sample=last,
                        source=name,
                        weight=weight,
                        samples=taken,
                        tokens=taken * seq_len,
                        epochs=_epochs(taken, windows[name]),
                        epochs_so_far=_epochs(after[source], windows[name]),
                    )
                )
    return rows


def _epochs(samples: int, windows: int) -> float:
    if windows == 0:
        return inf if samples else 0.0
    return samples / windows


def limited(
    mixture: Mixture,
    supplies: Mapping[str, Supply],
    *,
    samples: int,
    global_batch_size: int,
    on_exhausted: Literal["refuse", "reweight"],
    settled: int = 0,
) -> Mixture:
    """A mixture that takes no more of its sources than there is.

    With "reweight", a source that is used up has weight 0 from the sample after its last one on, and the others keep
    their ratios. Which samples come before the end does not depend on where the end is, so that a run may be
    lengthened.

    Args:
        mixture: the sources' order.
        supplies: by source.
        samples: of the whole run.
        global_batch_size: samples a step.
        on_exhausted: what is done about a source that is used up before the end.
        settled: samples that must stay as they are in `mixture`, because it was continued there (see `continued`).

    Raises:
        DataError: a source has no windows, or is used up and that is refused; or none is left before the end.
    """
    used = {i for s in mixture.stages if s.first_sample < samples for i, weight in enumerate(s.weights) if weight > 0}
    _check_supplies({mixture.names[i]: supplies[mixture.names[i]] for i in sorted(used)})
    limits = {i: limit for i in used if (limit := supplies[mixture.names[i]].limit) is not None}
    if on_exhausted == "refuse":
        _refuse(mixture, supplies, limits, samples, global_batch_size)
        return mixture
    while limits:
        lasts = {i: mixture.position_of(i, limit - 1) for i, limit in limits.items()}
        ends = {i: max(settled, last + 1) for i, last in lasts.items() if last is not None}
        end = min(ends.values(), default=samples)
        if end >= samples:
            break
        used_up = [i for i in ends if ends[i] == end]
        limits = {i: limit for i, limit in limits.items() if i not in used_up}
        mixture = _without(mixture, used_up, end, samples, global_batch_size)
    return mixture


def _check_supplies(supplies: Mapping[str, Supply]) -> None:
    for name, supply in supplies.items():
        if supply.max_epochs is not None and not 0 <= supply.max_epochs < inf:
            raise DataError(
                f"data.sources.{name}.max_epochs must be at least 0, but is {supply.max_epochs}; use 0 where the "
                "source may be repeated without end"
            )
        if supply.windows == 0:
            raise DataError(
                f"data.sources.{name} must hold a whole window of data.seq_len tokens, but is shorter; add "
                f"documents, or use a smaller data.seq_len or data.sources.{name}.weight=0"
            )
        if supply.limit == 0:
            raise DataError(
                f"data.sources.{name}.max_epochs must allow at least one of the {supply.windows:,} windows, but is "
                f"{supply.max_epochs}; use more, or data.sources.{name}.weight=0"
            )


def _refuse(
    mixture: Mixture, supplies: Mapping[str, Supply], limits: Mapping[int, int], samples: int, global_batch_size: int
) -> None:
    """Raises DataError for the sources of which a run would take more than there is: about the first one in full."""
    wanted = mixture.counts(samples).tolist()
    # The first sample that each one could not give, and the source.
    missing = [
        (position, i)
        for i, limit in limits.items()
        if wanted[i] > limit and (position := mixture.position_of(i, limit)) is not None
    ]
    if not missing:
        return
    (position, first), *others = sorted(missing)
    name, supply = mixture.names[first], supplies[mixture.names[first]]
    steps, lasts = -(-samples // global_batch_size), position // global_batch_size
    also = f" ({', '.join(mixture.names[i] for _, i in others)} would be used up later)" if others else ""
    raise DataError(
        f"data.sources.{name}.max_epochs must cover the run, but is {supply.max_epochs}: {steps:,} steps take "
        f"{wanted[first]:,} samples of {name}, which has {supply.windows:,} windows and may give {limits[first]:,}, "
        f"enough for {lasts:,} steps{also}; use data.sources.{name}.max_epochs="
        f"{ceil(Fraction(wanted[first], supply.windows))}, a lower weight, {_fewer_steps(lasts)}"
        "or data.on_exhausted=reweight"
    )


def _without(mixture: Mixture, used_up: Sequence[int], end: int, samples: int, global_batch_size: int) -> Mixture:
    """The same before `end`, and from there on without some sources; a stage that used none of them stays as it is.

    Raises:
        DataError: a stage would have no source left, before the run's end; one beyond it is left out.
    """
    stages = [stage for stage in mixture.stages if stage.first_sample < end]
    for stage in mixture.stages[mixture.stage_at(end) :]:
        begins = max(end, stage.first_sample)
        left = [Fraction(0) if i in used_up else weight for i, weight in enumerate(stage.weights)]
        rest = sum(left, start=Fraction(0))
        if rest > 0:
            weights = tuple(weight / rest for weight in left)
            # A stage that began earlier and lost nothing goes on in its order.
            if stage.first_sample >= end or weights != stage.weights:
                stages.append(Stage(begins, weights))
        elif begins < samples:
            gone = ", ".join(mixture.names[i] for i in used_up if stage.weights[i] > 0)
            steps, lasts = -(-samples // global_batch_size), begins // global_batch_size
            raise DataError(
                f"data.sources.*.max_epochs must leave a source for each of {samples:,} samples ({steps:,} steps), "
                f"but after {begins:,} ({lasts:,} steps) {gone} is used up as the last one; use more epochs, "
                f"{_fewer_steps(lasts)}or another source"
            )
    return Mixture(mixture.names, tuple(stages))


def _fewer_steps(lasts: int) -> str:
    return f"train.steps={lasts} " if lasts else ""
