"""What a rank is doing, for whoever looks at it from another thread."""

from enum import Enum

__all__ = ["Phase"]


class Phase(Enum):
    """A part of the loop. All but `outside` and `hooks` belong to each step, and take about as long each time."""

    outside = "outside of the steps"
    hooks = "a hook"
    data = "waiting for data"
    forward_backward = "forward and backward"
    update = "the optimizer's update"
    reduction = "the step's reduction"

    @property
    def is_regular(self) -> bool:
        """Whether it is a part of each step."""
        return self not in (Phase.outside, Phase.hooks)
