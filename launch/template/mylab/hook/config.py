"""Settings of the hook."""

from dataclasses import dataclass
from typing import ClassVar

from regrow.trainer.config import HookConfig

__all__ = ["SpikesConfig"]


@dataclass(kw_only=True, slots=True)
class SpikesConfig(HookConfig):
    """Writes each step whose loss is far above that of the steps before it to `spikes.jsonl`.

    Attributes:
        window: so many steps before it.
        factor: how far above their mean.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("hook", "spikes_schema")

    _target_: str = "regrow.launch.template.mylab.hook.spikes.SpikesHook"
    window: int = 20
    factor: float = 1.2
