"""Degrees as plain numbers: inferring and checking them needs no process group."""

from dataclasses import asdict, dataclass

from trainer.config import ParallelConfig

__all__ = ["Layout", "resolve_layout"]

_LATER = ("tp", "pp", "cp", "ep")


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
        ValueError: naming the degree, the rule, its value and the remedy.
    """
    for name in _LATER:
        if getattr(parallel, name) != 1:
            raise ValueError(
                f"parallel.{name} must be 1 in this version, but is {getattr(parallel, name)}; "
                "use parallel.dp_shard or parallel.dp_replicate"
            )
    if parallel.dp_replicate < 1:
        raise ValueError(f"parallel.dp_replicate must be at least 1, but is {parallel.dp_replicate}; use 1")
    if parallel.dp_shard < 1 and parallel.dp_shard != -1:
        raise ValueError(f"parallel.dp_shard must be at least 1 or -1, but is {parallel.dp_shard}; use -1")
    shard = parallel.dp_shard
    if shard == -1:
        if available_ranks % parallel.dp_replicate:
            raise ValueError(
                f"parallel.dp_replicate must divide the number of ranks ({available_ranks}), "
                f"but is {parallel.dp_replicate}; use {_divisors(available_ranks)}"
            )
        shard = available_ranks // parallel.dp_replicate
    layout = Layout(dp_replicate=parallel.dp_replicate, dp_shard=shard)
    if ranks_are_given and layout.world_size != available_ranks:
        raise ValueError(
            f"the product of parallel.dp_replicate ({layout.dp_replicate}) and parallel.dp_shard "
            f"({layout.dp_shard}) must be the number of ranks that were started ({available_ranks}), "
            f"but is {layout.world_size}; use parallel.dp_shard=-1 or start {layout.world_size} ranks"
        )
    return layout


def _divisors(n: int) -> str:
    found = [str(d) for d in range(1, n + 1) if n % d == 0]
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} or {found[-1]}"
