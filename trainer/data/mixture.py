"""Which source each sample of a mixture comes from, and its number within that source: arithmetic alone.

Weights are the decimals as written, so they are fractions n / P of a common P, and the order of sources repeats after
P samples. In one period, sample k of a source of weight w may stand at place floor(k / w) or later, and must stand
before place ceil((k + 1) / w); each place takes, of the samples that may stand there, the one that must come first.
Where all keep to these bounds, each source is within one sample of its weight in every prefix (Baruah, Cohen, Plaxton
and Varvel 1996, "Proportionate progress"); and as one place takes one sample, earliest deadline first keeps to them.
The period is a table, so any position is found as fast as the first one. All of it is in integers.

A stage is a set of weights from a sample on. It begins a period of its own, and each source goes on where it was.
"""

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from functools import cached_property, lru_cache
from heapq import heappop, heappush
from typing import final

import numpy as np
import numpy.typing as npt

from regrow.trainer.data.source import DataError, shown

__all__ = ["Mixture", "Stage", "StagePlan", "as_mixture", "as_weights", "continued"]

Int64s = npt.NDArray[np.int64]
Weight = float | int | str

_LONGEST_PERIOD = 2**20
_LAST_SAMPLE = 2**62
_LARGEST_EXPONENT = 18
_MOST_DIGITS = 36


def _source_weight(name: str) -> str:
    return f"data.sources.{name}.weight"


def as_weights(weights: Mapping[str, Weight], field: Callable[[str], str] = _source_weight) -> dict[str, Fraction]:
    """Weights as shares that add up to 1, exactly as their decimals are written: 0.1 is a tenth.

    Args:
        weights: by source; 0 leaves a source out.
        field: what a message calls a source's weight.

    Raises:
        DataError: one is no number, or below 0; all are 0; or their order would take too long to repeat.
    """
    if not weights:
        raise DataError("data.sources must name at least one source, but is empty; add one with its weight")
    exact = {name: _exact(value, field(name)) for name, value in weights.items()}
    total = sum(exact.values(), start=Fraction(0))
    if total == 0:
        fields = ", ".join(field(name) for name in exact)
        raise DataError(f"{fields} must not all be 0, but are; use a weight above 0 for at least one source")
    shares = {name: value / total for name, value in exact.items()}
    period = math.lcm(*(share.denominator for share in shares.values()))
    if period > _LONGEST_PERIOD:
        longest = max(exact, key=lambda name: exact[name].denominator)
        raise DataError(
            f"{field(longest)} must be so round that the sources' order repeats within {_LONGEST_PERIOD:,} samples, "
            f"but is {weights[longest]}, with which it repeats after {float(period):.2g}; {_rounded(shares, field)}"
        )
    return shares


def _exact(value: Weight, field: str) -> Fraction:
    try:
        written = Decimal(str(value))
    except InvalidOperation:
        written = Decimal("NaN")
    if not (
        written.is_finite()
        and written >= 0
        and abs(written.adjusted()) <= _LARGEST_EXPONENT
        and len(written.as_tuple().digits) <= _MOST_DIGITS
    ):
        raise DataError(
            f"{field} must be 0, or a number from 1e-{_LARGEST_EXPONENT} to 1e{_LARGEST_EXPONENT} of at most "
            f"{_MOST_DIGITS} digits, but is {shown(str(value))}; use the share that the source should have, as 0.7"
        )
    return Fraction(written)


def _rounded(shares: Mapping[str, Fraction], field: Callable[[str], str]) -> str:
    """The remedy for weights that are too fine: the fewest decimals that leave none of them at 0."""
    for decimals in (4, 5, 6):
        parts = {name: round(share * 10**decimals) for name, share in shares.items()}
        kept = all(parts[name] > 0 for name, share in shares.items() if share > 0)
        if kept and sum(parts.values()) <= _LONGEST_PERIOD:
            written = {name: f"{Decimal(part).scaleb(-decimals).normalize():f}" for name, part in parts.items()}
            if len(written) > 8:
                return f"use shares of 1 that are rounded to {decimals} decimals"
            return f"use {' '.join(f'{field(name)}={value}' for name, value in written.items())}"
    return "use shares of 1 that are rounded to 6 decimals, and 0 for what is less than 0.000001"


@dataclass(frozen=True, slots=True)
class Stage:
    """A set of weights from a sample on.

    Attributes:
        first_sample: samples of the run before it.
        weights: the share of each of the mixture's sources, in their order; they add up to 1.
    """

    first_sample: int
    weights: tuple[Fraction, ...]


@dataclass(frozen=True, slots=True)
class _Period:
    """One period of an order, P samples.

    Attributes:
        shares: samples of each source, int64 `(sources,)`.
        order: the source at each place, int32 `(P,)`.
        ranks: how many samples of that source come before, int32 `(P,)`.
        by_source: source · P + place of each sample, ascending, int64 `(P,)`.
        starts: where each source begins in `by_source`, int64 `(sources,)`.
    """

    shares: Int64s
    order: npt.NDArray[np.int32]
    ranks: npt.NDArray[np.int32]
    by_source: Int64s
    starts: Int64s

    def __len__(self) -> int:
        return len(self.order)

    def counts(self, samples: int) -> Int64s:
        """How many of the first `samples` samples each source has, int64 `(sources,)`."""
        periods, rest = divmod(samples, len(self))
        places = np.arange(len(self.shares), dtype=np.int64) * len(self) + rest
        within = np.searchsorted(self.by_source, places) - self.starts
        counts: Int64s = periods * self.shares + within
        return counts

    def place(self, source: int, sample: int) -> int:
        """Where a source's sample number `sample` stands."""
        periods, rest = divmod(sample, int(self.shares[source]))
        return periods * len(self) + int(self.by_source[self.starts[source] + rest]) - source * len(self)


@lru_cache(maxsize=16)
def _period(weights: tuple[Fraction, ...]) -> _Period:
    length = math.lcm(*(w.denominator for w in weights))
    assert length <= _LONGEST_PERIOD
    shares = np.array([int(w * length) for w in weights], dtype=np.int64)
    starts = np.cumsum(shares) - shares
    sources = np.repeat(np.arange(len(weights), dtype=np.int64), shares)
    samples = np.arange(length, dtype=np.int64) - starts[sources]
    releases = samples * length // shares[sources]
    deadlines = -(-(samples + 1) * length // shares[sources])
    order = _earliest_deadline_first(releases, deadlines * len(weights) + sources) % len(weights)
    # Stable: a source's places stay ascending.
    places = np.argsort(order, kind="stable")
    ranks = np.empty(length, dtype=np.int32)
    ranks[places] = samples
    period = _Period(shares, order.astype(np.int32), ranks, sources * length + places, starts)
    for table in (period.shares, period.order, period.ranks, period.by_source, period.starts):
        table.flags.writeable = False
    return period


def _earliest_deadline_first(releases: Int64s, keys: Int64s) -> Int64s:
    """The keys in the order in which they are taken: at each place the least of those released by then."""
    arrival = np.argsort(releases, kind="stable")
    arriving = keys[arrival].tolist()
    released = np.searchsorted(releases[arrival], np.arange(len(keys)), side="right").tolist()
    waiting: list[int] = []
    taken = []
    arrived = 0
    for until in released:
        while arrived < until:
            heappush(waiting, arriving[arrived])
            arrived += 1
        taken.append(heappop(waiting))
    return np.array(taken, dtype=np.int64)


@final
@dataclass(frozen=True)
class Mixture:
    """The source of every sample of a run. Immutable; pickled as its weights alone.

    Within a stage, each source is within one sample of its weight at every sample, counted from the stage's start.

    Attributes:
        names: the sources; among those that must come equally early, the first one named comes first.
        stages: in ascending order, the first one from sample 0 on.
    """

    names: tuple[str, ...]
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        firsts = [stage.first_sample for stage in self.stages]
        assert firsts[:1] == [0]
        assert firsts == sorted(set(firsts))
        assert len(set(self.names)) == len(self.names)
        assert all(len(s.weights) == len(self.names) and sum(s.weights) == 1 for s in self.stages)
        assert all(weight >= 0 for stage in self.stages for weight in stage.weights)

    def __reduce__(self) -> tuple[type["Mixture"], tuple[tuple[str, ...], tuple[Stage, ...]]]:
        return Mixture, (self.names, self.stages)

    @cached_property
    def _firsts(self) -> Int64s:
        return np.array([stage.first_sample for stage in self.stages], dtype=np.int64)

    @cached_property
    def _periods(self) -> list[_Period]:
        return [_period(stage.weights) for stage in self.stages]

    @cached_property
    def _carried(self) -> list[Int64s]:
        """Samples of each source before each stage."""
        carried = [np.zeros(len(self.names), dtype=np.int64)]
        for period, samples in zip(self._periods, np.diff(self._firsts).tolist(), strict=False):
            carried.append(carried[-1] + period.counts(samples))
        return carried

    def stage_at(self, position: int) -> int:
        """The number of the stage that a sample belongs to."""
        assert position >= 0
        return bisect.bisect_right(self.stages, position, key=lambda stage: stage.first_sample) - 1

    def locate(self, positions: Int64s) -> tuple[Int64s, Int64s]:
        """Where samples come from.

        Args:
            positions: of the run's samples, int64 `(n,)`, at least 0, in any order.

        Returns:
            The number of each one's source among `names`, and the number of the sample among all of that source's
            in the run, both int64 `(n,)`.
        """
        assert positions.min(initial=0) >= 0
        stages = np.searchsorted(self._firsts, positions, side="right") - 1
        sources, samples = np.empty_like(positions), np.empty_like(positions)
        for stage in np.unique(stages).tolist():
            chosen = stages == stage
            period = self._periods[stage]
            periods, places = np.divmod(positions[chosen] - self._firsts[stage], len(period))
            of = period.order[places].astype(np.int64)
            sources[chosen] = of
            samples[chosen] = self._carried[stage][of] + periods * period.shares[of] + period.ranks[places]
        return sources, samples

    def counts(self, position: int) -> Int64s:
        """How many samples each source has before `position`, int64 `(sources,)`."""
        stage = self.stage_at(position)
        counts: Int64s = self._carried[stage] + self._periods[stage].counts(position - int(self._firsts[stage]))
        return counts

    def position_of(self, source: int, sample: int) -> int | None:
        """The position of a source's sample number `sample`; None: the run never comes to it."""
        before = [int(carried[source]) for carried in self._carried]
        stage = bisect.bisect_right(before, sample) - 1
        if self.stages[stage].weights[source] == 0:
            return None
        return int(self._firsts[stage]) + self._periods[stage].place(source, sample - before[stage])


def continued(old: Mixture, new: Mixture, at_sample: int) -> Mixture:
    """`old` before a sample, and from it on the weights of `new`; each source goes on where it was.

    Where nothing changes, the result is `old`. A source that only one of them has is not used by the other.
    """
    names = (*old.names, *(name for name in new.names if name not in old.names))
    kept = [stage for stage in _renamed(old, names) if stage.first_sample < at_sample]
    coming = _renamed(new, names)
    in_force = coming[new.stage_at(at_sample)]
    if not kept or in_force.first_sample == at_sample or in_force.weights != kept[-1].weights:
        kept.append(Stage(at_sample, in_force.weights))
    return Mixture(names, (*kept, *(stage for stage in coming if stage.first_sample > at_sample)))


def _renamed(mixture: Mixture, names: tuple[str, ...]) -> list[Stage]:
    """The stages with weights for each of `names`."""
    by_name = [dict(zip(mixture.names, stage.weights, strict=True)) for stage in mixture.stages]
    return [
        Stage(stage.first_sample, tuple(weights.get(name, Fraction(0)) for name in names))
        for stage, weights in zip(mixture.stages, by_name, strict=True)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """A stage as a config has it.

    Attributes:
        weights: by source; one that is not named is not used.
        from_step: steps of the run before it; or
        from_tokens: tokens of the run before it; the stage waits for the next step.
    """

    weights: Mapping[str, Weight]
    from_step: int | None = None
    from_tokens: int | None = None


def as_mixture(
    weights: Mapping[str, Weight], plans: Sequence[StagePlan] = (), *, seq_len: int, global_batch_size: int
) -> Mixture:
    """The mixture that a config asks for.

    Args:
        weights: `data.sources.*.weight`, up to the first stage; a stage from step 0 on replaces them.
        plans: `data.stages`.
        seq_len: tokens a sample.
        global_batch_size: samples a step.

    Raises:
        DataError: weights or stages that cannot be, by their fields.
    """
    names = tuple(weights)
    starts = [_first_sample(f"data.stages[{i}]", p, seq_len, global_batch_size) for i, p in enumerate(plans)]
    stages = [] if starts and starts[0] == 0 else [Stage(0, tuple(as_weights(weights).values()))]
    for i, (plan, start) in enumerate(zip(plans, starts, strict=True)):
        if stages and start <= stages[-1].first_sample:
            raise DataError(
                f"data.stages[{i}] must begin at a later step than the stage before it (step "
                f"{stages[-1].first_sample // global_batch_size:,}), but begins at step "
                f"{start // global_batch_size:,}; give the stages in ascending order and at least a step apart"
            )
        stages.append(Stage(start, _stage_weights(f"data.stages[{i}].weights", plan, names)))
    return Mixture(names, tuple(stages))


def _first_sample(field: str, plan: StagePlan, seq_len: int, global_batch_size: int) -> int:
    if (plan.from_step is None) == (plan.from_tokens is None):
        has = "neither" if plan.from_step is None else "both"
        raise DataError(f"{field} must have either from_step or from_tokens, but has {has}; use one of them")
    unit, value, per_step = (
        ("from_tokens", plan.from_tokens, seq_len * global_batch_size)
        if plan.from_step is None
        else ("from_step", plan.from_step, 1)
    )
    assert value is not None
    first = -(-value // per_step) * global_batch_size
    if value < 0 or first > _LAST_SAMPLE:
        raise DataError(
            f"{field}.{unit} must be at least 0 and within {_LAST_SAMPLE:,} samples, but is {value:,}; use how many "
            f"{unit.removeprefix('from_')}{'s' if unit == 'from_step' else ''} of the run come before the stage"
        )
    return first


def _stage_weights(field: str, plan: StagePlan, names: tuple[str, ...]) -> tuple[Fraction, ...]:
    unknown = [name for name in plan.weights if name not in names]
    if unknown:
        raise DataError(
            f"{field}.{shown(unknown[0])} must be one of data.sources ({', '.join(names)}), but is not; "
            "correct its name or add the source"
        )
    if not plan.weights:
        raise DataError(f"{field} must name at least one source, but is empty; use some of {', '.join(names)}")
    shares = as_weights(plan.weights, lambda name: f"{field}.{name}")
    return tuple(shares.get(name, Fraction(0)) for name in names)
