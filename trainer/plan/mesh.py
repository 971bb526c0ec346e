"""Which rank has which coordinates, and over which links each axis talks: arithmetic alone."""

from collections.abc import Iterator
from dataclasses import dataclass

from regrow.trainer.parallel.layout import Layout

__all__ = ["Axis", "Links", "axes_of", "coordinates_of_rank"]

# From the outermost, over the slowest links, to the innermost; as trainer/parallel/mesh.py arranges ranks.
_ORDER = ("pp", "dp_replicate", "dp_shard", "cp", "tp")

# What a group's ranks talk over.
Links = str
_PURPOSE = {
    "pp": "activations between stages, point to point",
    "dp_replicate": "gradients, all-reduced once a step",
    "dp_shard": "parameters gathered, gradients scattered, for every block",
    "cp": "keys and values, or heads, in every attention; shares parameters with dp_shard",
    "tp": "activations of every block, gathered and scattered",
    "ep": "tokens to their experts and back, in every mixture",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """One axis of the mesh.

    Attributes:
        name: as the degree's.
        ranks: of a group along it.
        stride: between neighbours of a group, in ranks.
        links: `NVLink` where each group lies within a machine, else `network`.
        carries: what goes over it.
        first_group: the ranks of the group that rank 0 is in.
    """

    name: str
    ranks: int
    stride: int
    links: Links
    carries: str
    first_group: tuple[int, ...]


def axes_of(layout: Layout, gpus_per_node: int) -> list[Axis]:
    """The axes of more than one rank, from the outermost.

    Args:
        layout: the degrees.
        gpus_per_node: ranks of a machine, which are neighbours.
    """
    found = [_axis(name, ranks, stride, gpus_per_node) for name, ranks, stride in _strides(layout) if ranks > 1]
    if layout.ep > 1:
        # Borrowed from the innermost ranks of dp_shard, cp and tp.
        found.append(_axis("ep", layout.ep, 1, gpus_per_node))
    return found


def _strides(layout: Layout) -> Iterator[tuple[str, int, int]]:
    stride = layout.world_size
    for name in _ORDER:
        ranks = getattr(layout, name)
        stride //= ranks
        yield name, ranks, stride


def _axis(name: str, ranks: int, stride: int, gpus_per_node: int) -> Axis:
    group = tuple(i * stride for i in range(ranks))
    # Groups are blocks of `ranks · stride` ranks: within a machine where such blocks divide it.
    inside = gpus_per_node % (ranks * stride) == 0
    return Axis(
        name=name,
        ranks=ranks,
        stride=stride,
        links="NVLink" if inside else "network",
        carries=_PURPOSE[name],
        first_group=group,
    )


def coordinates_of_rank(layout: Layout, rank: int) -> dict[str, int]:
    """The coordinate along each axis of more than one rank."""
    found = {}
    for name, ranks, stride in _strides(layout):
        if ranks > 1:
            found[name] = rank // stride % ranks
    if layout.ep > 1:
        found["ep"] = rank % layout.ep
    return found
