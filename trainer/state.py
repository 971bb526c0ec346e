"""The part of a run's state that is not a tensor of the model or the optimizer."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from regrow.checkpoint.documents import Count, convert_document
from regrow.checkpoint.policy.best import BestMetric
from regrow.trainer.data.mixture_source import MixtureRecord

__all__ = ["TrainState"]


@dataclass(kw_only=True, slots=True)
class TrainState:
    """Everything else is a function of the config and this.

    Attributes:
        step: optimizer steps done.
        samples_consumed: position in the global order of samples.
        tokens: labels trained on.
        schedule_origin: the step at which the learning-rate schedule began.
        schedule_total: the steps that the schedule spans.
        best: the best value of each tracked metric.
        mixture: of the data's sources; None where there is one source.
    """

    step: Count = 0
    samples_consumed: Count = 0
    tokens: Count = 0
    schedule_origin: Count = 0
    schedule_total: Count = 0
    best: dict[str, float] = field(default_factory=dict)
    mixture: MixtureRecord | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values; those of 0.1.0 where nothing else is used."""
        values = asdict(self)
        if self.mixture is None:
            del values["mixture"]
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TrainState":
        """The inverse of `as_json`.

        Raises:
            DocumentError: a value is of another type, or below 0.
        """
        return convert_document(values, cls)

    def note_best(self, name: str, value: float | None, *, lower_is_better: bool) -> None:
        """Remembers a metric's value where it is the best so far; one that is not a number never is."""
        metric = BestMetric(metric=name, lower_is_better=lower_is_better)
        if value is not None and metric.improves(value, self.best.get(name)):
            self.best[name] = value

    def without(self, exclude: tuple[str, ...], *, schedule_total: int) -> "TrainState":
        """This state, freshly loaded, with the excluded parts as they start.

        Leaving out `lr_scheduler` begins the schedule at this step; leaving out `data_loader` begins the order
        of samples anew.

        Args:
            exclude: names of parts.
            schedule_total: the steps that a schedule begun here would span.
        """
        state = TrainState.from_json(self.as_json())
        if "lr_scheduler" in exclude:
            state.schedule_origin, state.schedule_total = self.step, schedule_total
        if "data_loader" in exclude:
            state.samples_consumed, state.mixture = 0, None
        return state
