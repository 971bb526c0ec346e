"""What a hook is: an optional part of the loop. `regrow.trainer.loop` shows when each method is called."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regrow.trainer.loop import Trainer

__all__ = ["Hook"]


class Hook:
    """No-op methods; a hook overrides those it needs. They run in the order that the start banner lists.

    Methods run on every rank. A hook never decides from a rank's own clock or signal, and touches no parameter.
    """

    def restore(self, trainer: "Trainer") -> None:
        """Before anything else: bring model, optimizer and train state to where the run stands."""

    def fit_start(self, trainer: "Trainer") -> None:
        """The state is what training continues from."""

    def stopped(self, trainer: "Trainer") -> None:
        """Asked to stop before the next step began, while it had no data; the step before has ended."""

    def step_start(self, trainer: "Trainer") -> None:
        """Before the first forward pass of a step."""

    def before_optimizer_step(self, trainer: "Trainer") -> None:
        """Gradients are complete; nothing has changed the parameters since the last step."""

    def validate(self, trainer: "Trainer") -> None:
        """After the update, `trainer.state.step` being the step just done: measure, and add to its row."""

    def step_end(self, trainer: "Trainer") -> None:
        """The step is over; its metrics may still be on the device."""

    def on_metrics(self, trainer: "Trainer", row: Mapping[str, Any]) -> None:
        """A step's metrics have reached the host: one step late, or at once before a save."""

    def before_commit(self, trainer: "Trainer", step: int) -> None:
        """A checkpoint of `step` is about to become valid: what belongs to earlier steps must be durable."""

    def on_committed(self, trainer: "Trainer", step: int) -> None:
        """A checkpoint of `step` is durable."""

    def fit_end(self, trainer: "Trainer") -> None:
        """The run ends as asked: finished or stopped, saved."""

    def on_exception(self, trainer: "Trainer", error: BaseException) -> None:
        """The run ends by an error: no save, no collectives."""
