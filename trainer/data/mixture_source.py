"""A mixture as a config has it, and as a run keeps it over changes of its weights."""

import re
from dataclasses import dataclass, field
from fractions import Fraction
from typing import final

from regrow.checkpoint.documents import Count
from regrow.trainer.data.config import DataConfig
from regrow.trainer.data.mixture import Mixture, Stage, StagePlan, as_mixture, continued
from regrow.trainer.data.mixture_config import MixtureConfig, OnExhausted
from regrow.trainer.data.mixture_limits import Supply, limited
from regrow.trainer.data.source import DataError, Source, shown

__all__ = ["MixtureRecord", "MixtureSource", "StageRecord", "continue_mixture", "declared_mixture"]

_NAME = re.compile(r"[A-Za-z][\w-]{0,63}", re.ASCII)


@final
class MixtureSource(Source):
    """`data=mixture`: no documents of its own, but sources that have."""

    config: MixtureConfig

    def check(self) -> None:
        config = self.config
        if not config.sources:
            raise DataError(
                "data.sources must name at least one source, but is empty; add for instance "
                "+data_source@data.sources.web=text data.sources.web.files=[…]"
            )
        for name in config.sources:
            if not _NAME.fullmatch(name):
                raise DataError(
                    f"data.sources must have names of letters, digits, - and _ that begin with a letter, but has "
                    f"{shown(repr(name))}; rename it"
                )
        if config.tokenizer is None and not all(part.CONFIG.TOKENISED for part in config.sources.values()):
            raise DataError(
                "data.tokenizer must be set in a mixture, whose sources share it, but is null; give a tokenizer.json "
                "(regrow-data tokenize DIR FILE… trains one)"
            )
        declared_mixture(config)

    def children(self) -> dict[str, DataConfig]:
        return {name: part.alone(self.config) for name, part in sorted(self.config.sources.items())}


def declared_mixture(config: MixtureConfig) -> Mixture:
    """The mixture that a config asks for, sources in the order of their names.

    Raises:
        DataError: see `as_mixture`.
    """
    return as_mixture(
        {name: part.weight for name, part in sorted(config.sources.items())},
        [StagePlan(weights=s.weights, from_step=s.from_step, from_tokens=s.from_tokens) for s in config.stages],
        seq_len=config.seq_len,
        global_batch_size=config.global_batch_size,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class StageRecord:
    """A stage as a checkpoint keeps it.

    Attributes:
        first_sample: samples of the run before it.
        weights: shares as fractions, by source.
    """

    first_sample: Count
    weights: dict[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureRecord:
    """Which samples a run has read and will read, as long as its config stays what it is.

    Attributes:
        names: of the sources.
        declared: the stages that the config asked for.
        max_epochs: of the sources that have it.
        on_exhausted: as in the config.
        stages: those before exhausted sources were left out: the declared ones, or what went before a change of the
            config and the declared ones after it.
        settled: samples read before the last such change.
    """

    names: list[str]
    declared: list[StageRecord]
    max_epochs: dict[str, float] = field(default_factory=dict)
    on_exhausted: str = OnExhausted.refuse.name
    stages: list[StageRecord] = field(default_factory=list)
    settled: Count = 0


def continue_mixture(
    config: MixtureConfig, windows: dict[str, int], *, steps: int, before: MixtureRecord | None, at_sample: int
) -> tuple[Mixture, MixtureRecord]:
    """The mixture that a run goes on with, and what a later start must know of it.

    As long as weights, stages and limits are what they were, it is the same at every start. Where they have changed,
    samples before `at_sample` stay what they were, and those from there on are as the config says now.

    Args:
        config: of the command.
        windows: of each source's training split.
        steps: that the run is to have.
        before: what the checkpoint says; None at the start of a run.
        at_sample: samples consumed.

    Raises:
        DataError: weights, stages or limits that cannot be.
    """
    declared = declared_mixture(config)
    limits = {name: part.max_epochs for name, part in sorted(config.sources.items()) if part.max_epochs}
    record = MixtureRecord(
        names=list(declared.names),
        declared=_stages_of(declared),
        max_epochs=limits,
        on_exhausted=config.on_exhausted.name,
        stages=_stages_of(declared),
    )
    base, settled = declared, 0
    if before is not None and at_sample > 0:
        if _asks_for(before) == _asks_for(record):
            record, base, settled = before, _mixture_of(before.names, before.stages), before.settled
        else:
            base, settled = continued(_effective(before, windows, steps, config), declared, at_sample), at_sample
            record = MixtureRecord(
                names=list(base.names),
                declared=record.declared,
                max_epochs=limits,
                on_exhausted=record.on_exhausted,
                stages=_stages_of(base),
                settled=settled,
            )
    return _limited(base, limits, windows, steps, config.global_batch_size, config.on_exhausted.name, settled), record


def _asks_for(record: MixtureRecord) -> tuple[list[StageRecord], dict[str, float], str]:
    return record.declared, record.max_epochs, record.on_exhausted


def _effective(record: MixtureRecord, windows: dict[str, int], steps: int, config: MixtureConfig) -> Mixture:
    """What a run read that was recorded so. What it would have refused later on is not asked."""
    base = _mixture_of(record.names, record.stages)
    if record.on_exhausted != OnExhausted.reweight.name:
        return base
    return _limited(
        base, record.max_epochs, windows, steps, config.global_batch_size, record.on_exhausted, record.settled
    )


def _limited(
    mixture: Mixture,
    limits: dict[str, float],
    windows: dict[str, int],
    steps: int,
    global_batch_size: int,
    on_exhausted: str,
    settled: int,
) -> Mixture:
    supplies = {n: Supply(windows=windows.get(n, 0), max_epochs=limits.get(n)) for n in mixture.names}
    return limited(
        mixture,
        supplies,
        samples=steps * global_batch_size,
        global_batch_size=global_batch_size,
        on_exhausted="reweight" if on_exhausted == OnExhausted.reweight.name else "refuse",
        settled=settled,
    )


def _stages_of(mixture: Mixture) -> list[StageRecord]:
    return [
        StageRecord(
            first_sample=stage.first_sample,
            weights={n: str(w) for n, w in zip(mixture.names, stage.weights, strict=True)},
        )
        for stage in mixture.stages
    ]


def _mixture_of(names: list[str], stages: list[StageRecord]) -> Mixture:
    """The inverse of `_stages_of`.

    Raises:
        DataError: the record is none that was written.
    """
    try:
        return Mixture(
            tuple(names), tuple(Stage(s.first_sample, tuple(Fraction(s.weights[n]) for n in names)) for s in stages)
        )
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise DataError(
            f"the checkpoint's record of its mixture must have a share for each source and stage, but cannot be read "
            f"({shown(str(error))}); go on from another step with checkpoint.load_step"
        ) from error
