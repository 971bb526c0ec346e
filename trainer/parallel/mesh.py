"""The meshes: the same ranks, arranged for parameters, for data and for experts.

Each is made whole, from the outermost axis (pipeline, the slowest links) to the innermost (tensor, the fastest), so
that nothing depends on torch's private ways of flattening a mesh.
"""

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from regrow.trainer.parallel.layout import Layout

__all__ = ["Meshes", "make_meshes"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Meshes:
    """Three arrangements of all ranks.

    Attributes:
        dense: axes `pp dp_replicate fsdp tp`; fsdp holds dp_shard and cp, which see different tokens alike.
        data: axes `pp dp_replicate dp_shard cp tp`.
        experts: axes `pp dp_replicate efsdp ep`; what is left of dp_shard, cp and tp shards each expert's weights.
    """

    dense: DeviceMesh
    data: DeviceMesh
    experts: DeviceMesh


def make_meshes(layout: Layout, device_type: str) -> Meshes:
    """Makes the process groups; every rank calls this."""
    sharing = layout.dp_shard * layout.cp * layout.tp
    return Meshes(
        dense=init_device_mesh(
            device_type,
            (layout.pp, layout.dp_replicate, layout.dp_shard * layout.cp, layout.tp),
            mesh_dim_names=("pp", "dp_replicate", "fsdp", "tp"),
        ),
        data=init_device_mesh(
            device_type,
            (layout.pp, layout.dp_replicate, layout.dp_shard, layout.cp, layout.tp),
            mesh_dim_names=("pp", "dp_replicate", "dp_shard", "cp", "tp"),
        ),
        experts=init_device_mesh(
            device_type,
            (layout.pp, layout.dp_replicate, sharing // layout.ep, layout.ep),
            mesh_dim_names=("pp", "dp_replicate", "efsdp", "ep"),
        ),
    )
