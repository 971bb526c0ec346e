"""The schema of the profiler."""

from dataclasses import dataclass, field
from typing import ClassVar

from regrow.trainer.config import HookConfig

__all__ = ["ProfileConfig"]


@dataclass(kw_only=True, slots=True)
class ProfileConfig(HookConfig):
    """Where time and memory of some steps go, by torch's profiler: a trace for Perfetto, and a summary in the log.

    Attributes:
        at: steps at which profiles begin; a file named `request` in the run's folder `profile` begins one too.
        count: steps in each profile.
        ranks: ranks that are profiled; empty: all.
        memory: also who held how much at the peak, with the calls; on GPUs a snapshot for pytorch.org/memory_viz.
        on_oom: where a rank runs out of memory, say what held it, and on GPUs keep a snapshot.
        history: with `on_oom`, allocations on GPUs that are remembered all the time, with their calls; 0: none, and
            the snapshot has blocks without calls.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("hook", "profile_schema")
    _target_: str = "regrow.trainer.hooks.profile.ProfileHook"
    at: list[int] = field(default_factory=lambda: [10])
    count: int = 3
    ranks: list[int] = field(default_factory=lambda: [0])
    memory: bool = False
    on_oom: bool = True
    history: int = 0
