"""What a learning-rate schedule is: a pure function of the step."""

from abc import ABC, abstractmethod

__all__ = ["Schedule"]


class Schedule(ABC):
    """A factor on `optimizer.lr`."""

    @abstractmethod
    def factor(self, step: int, total: int) -> float:
        """The factor for a step.

        Args:
            step: 1 for the first step since the schedule began.
            total: the steps that the schedule spans; from there on its last value holds.
        """

    @abstractmethod
    def shortened(self, total: int) -> str | None:
        """One sentence on what had to be shortened to fit into `total` steps; None where all of it fits."""
