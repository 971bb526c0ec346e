"""Degrees as plain numbers: inferring them needs no process group."""

from dataclasses import asdict, dataclass

from regrow.errors import ConfigError
from regrow.trainer.config import ParallelConfig

__all__ = ["DEGREES", "Layout", "divisors_of", "resolve_layout"]

DEGREES = ("dp_replicate", "dp_shard", "tp", "pp", "cp")


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The degrees of a run, all at least 1."""

    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1

    @property
    def world_size(self) -> int:
        """Ranks; `ep` is borrowed from the others."""
        return self.dp_replicate * self.dp_shard * self.tp * self.pp * self.cp

    @property
    def data_ranks(self) -> int:
        """Ranks that read different data."""
        return self.dp_replicate * self.dp_shard

    def as_dict(self) -> dict[str, int]:
        """Degree by name, for records."""
        return asdict(self)

    def __str__(self) -> str:
        degrees = " × ".join(f"{name} {n}" for name, n in self.as_dict().items() if n > 1)
        return degrees or "one rank"


def resolve_layout(parallel: ParallelConfig, available_ranks: int, *, ranks_are_given: bool) -> Layout:
    """Fills in `dp_shard=-1` and checks the degrees against the ranks.

    Args:
        parallel: the config.
        available_ranks: ranks that torchrun or srun started, or, where there are none, how many -1 stands for.
        ranks_are_given: whether they were started already, so that the product must match.

    Raises:
        ConfigError: naming the degree, the rule, its value and the remedy.
    """
    for name in (*DEGREES, "ep"):
        value = getattr(parallel, name)
        if value < 1 and not (name == "dp_shard" and value == -1):
            allowed = "at least 1 or -1" if name == "dp_shard" else "at least 1"
            raise ConfigError(
                f"parallel.{name} must be {allowed}, but is {value}; use {-1 if name == 'dp_shard' else 1}"
            )
    shard = parallel.dp_shard
    others = parallel.dp_replicate * parallel.tp * parallel.pp * parallel.cp
    if shard == -1:
        if available_ranks % others:
            raise ConfigError(_too_many(parallel, available_ranks, others))
        shard = available_ranks // others
    layout = Layout(
        dp_replicate=parallel.dp_replicate,
        dp_shard=shard,
        tp=parallel.tp,
        pp=parallel.pp,
        cp=parallel.cp,
        ep=parallel.ep,
    )
    if ranks_are_given and layout.world_size != available_ranks:
        degrees = ", ".join(f"parallel.{n} ({getattr(layout, n)})" for n in DEGREES if getattr(layout, n) > 1)
        raise ConfigError(
            f"the product of {degrees or 'the degrees (1)'} must be the number of ranks that were started "
            f"({available_ranks}), but is {layout.world_size}; use parallel.dp_shard=-1 or start "
            f"{layout.world_size} ranks"
        )
    return layout


def _too_many(parallel: ParallelConfig, available: int, others: int) -> str:
    used = [n for n in ("dp_replicate", "tp", "pp", "cp") if getattr(parallel, n) > 1]
    if len(used) == 1:
        return (
            f"parallel.{used[0]} must divide the number of ranks ({available}), but is {others}; "
            f"use {divisors_of(available)}"
        )
    product = " · ".join(f"parallel.{n}" for n in used)
    return (
        f"{product} must divide the number of ranks ({available}), but is {others}; lower one of them or give "
        "parallel.dp_shard"
    )


def divisors_of(n: int) -> str:
    """All divisors, as words for an error message."""
    found = [str(d) for d in range(1, n + 1) if n % d == 0]
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} or {found[-1]}"
