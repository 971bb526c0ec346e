"""How a `Checkpointer` works."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from regrow.checkpoint.policy.retention import RetentionRule

__all__ = ["CheckpointerOptions"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointerOptions:
    """How a `Checkpointer` works.

    Attributes:
        keep_latest_k: newest steps to keep; 0 keeps all.
        rules: further reasons to keep a step (`regrow.checkpoint.policy.retention`).
        max_save_errors: so many failed saves in a row raise an error; fewer are logged, and the next one is tried.
        files_per_rank: a rank's share is written as so many files at once.
        commit_timeout_s: a step whose ranks have not all reported by then has failed.
        lease_timeout_s: a writer on another host whose lease has not moved for so long counts as dead.
        storage_options: for a URL: `endpoint`, `region` and the like.
        read_only: only load and look: no lease is taken, and `save` is an error.
    """

    keep_latest_k: int = 10
    rules: Sequence[RetentionRule] = ()
    max_save_errors: int = 5
    files_per_rank: int = 1
    commit_timeout_s: float = 600.0
    lease_timeout_s: float = 60.0
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    read_only: bool = False

    def __post_init__(self) -> None:
        for name, least in (("keep_latest_k", 0), ("max_save_errors", 1), ("files_per_rank", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name} must be at least {least}, but is {getattr(self, name)}; use {least} or more"
                )
