"""What a hook is: an optional part of the loop. `regrow.trainer.loop` shows when each event comes.

Events have one rule for their names: `before_X` and `after_X` are the points around X. Beside them, `on_exception`
tells of the error that ends the run, and `close` is the last call in any case.

A hook is built as `Kind(config)`, before anything else of the run is there: its constructor checks the config, and
starts nothing. What belongs to the run (its folder, its tokenizer, its checkpoint plan) is in `trainer.resources`
from `before_fit` on, see `regrow.trainer.resources`. A hook asks the trainer, and assigns none of its fields:
`add_metrics`, `request_stop`, `agree_on_stop`, `flush`, `evaluating`, `state.note_best` and, in `before_fit`,
`reduction.sum`, `reduction.max` and `reduction.carry` are there for it.
"""

# ruff: noqa: B024, B027 (every event is optional, and does nothing where a hook does not override it)

from abc import ABC
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regrow.trainer.loop import Trainer

__all__ = ["Hook"]

# What events were called before; a method of that name would never be called.
_FORMER = {
    "restore": "the trainer's Restorer",
    "fit_start": "before_fit",
    "stopped": "after_last_step",
    "step_start": "before_step",
    "validate": "after_optimizer_step",
    "step_end": "after_step",
    "on_metrics": "after_metrics",
    "on_committed": "after_commit",
    "fit_end": "after_fit",
}


class Hook(ABC):
    """Events that do nothing; a hook overrides those it needs. They run in the order that the start of a run logs.

    Events come on every rank. A hook never decides from a rank's own clock or signal, and touches no parameter.
    """

    def __init_subclass__(cls) -> None:
        """Refuses what looks like an event and is none, since it would never be called.

        Raises:
            TypeError: naming it.
        """
        super().__init_subclass__()
        for name in vars(cls):
            if name in _FORMER:
                raise TypeError(f"{cls.__name__}.{name} must have the event's name, which is {_FORMER[name]} now")
            if name.startswith(("before_", "after_", "on_")) and name not in vars(Hook):
                events = ", ".join(n for n in vars(Hook) if not n.startswith("_"))
                raise TypeError(f"{cls.__name__}.{name} must be one of the events ({events}); rename it")

    def before_fit(self, trainer: "Trainer") -> None:
        """The state is what training continues from. From here on `close` is certain to come."""

    def before_step(self, trainer: "Trainer") -> None:
        """Before the first forward pass of a step."""

    def before_optimizer_step(self, trainer: "Trainer") -> None:
        """Gradients are complete; nothing has changed the parameters since the last step."""

    def after_optimizer_step(self, trainer: "Trainer") -> None:
        """After the update, `trainer.state.step` being the step just done: measure, and add to its row."""

    def after_step(self, trainer: "Trainer") -> None:
        """The step is over; its metrics may still be on the device."""

    def after_metrics(self, trainer: "Trainer", row: Mapping[str, Any]) -> None:
        """A step's metrics have reached the host: one step late, or at once before a save."""

    def before_commit(self, trainer: "Trainer", step: int) -> None:
        """A checkpoint of `step` is about to become valid: what belongs to earlier steps must be durable."""

    def after_commit(self, trainer: "Trainer", step: int) -> None:
        """A checkpoint of `step` is durable."""

    def after_last_step(self, trainer: "Trainer") -> None:
        """No step follows: all are done, or the ranks have agreed to stop. All rows have been handed on."""

    def after_fit(self, trainer: "Trainer") -> None:
        """The run ends as asked: finished or stopped, saved. An error here is still the run's."""

    def on_exception(self, trainer: "Trainer", error: BaseException) -> None:
        """The run ends by an error: no save, no collectives. An error here is logged, and hides no other."""

    def close(self, trainer: "Trainer") -> None:
        """Gives back what the hook holds (threads, files, a terminal): the last call, once, however the run ended.

        Comes in reverse order, to the hooks whose `before_fit` was begun. Waits for no other rank. An error here is
        logged, and hides no other.
        """
