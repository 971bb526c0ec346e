"""Schema of what `mode=plan` is told."""

from dataclasses import dataclass

__all__ = ["PlanConfig"]


@dataclass(kw_only=True, slots=True)
class PlanConfig:
    """What `mode=plan` assumes of the machine and how it answers; no run looks at it.

    Attributes:
        json: print one JSON document instead of text.
        fit: search for layouts: NODES×GPUS×GiB, as `1x8x80`; null plans the layout that is given.
        nodes: machines, for `parallel.dp_shard=-1`.
        gpus_per_node: ranks of a machine, which its fast links join.
        memory_gib: of a GPU.
        reserved_gib: of it, what torch's allocator does not give: the CUDA context and NCCL's buffers.
        allocator_slack: what the allocator holds beyond what is live, as a part of that: the gaps between tensors.
        node_link_gbs: GB/s that a GPU sends to the others of its machine (NVLink: 450).
        network_gbs: GB/s that a GPU sends to other machines (400 Gb/s: 50).
        host_link_gbs: GB/s from a GPU to the host's memory (PCIe 5: 55).
        storage_gbs: GB/s that a machine writes to the storage of checkpoints.
        peak_tflops: of a GPU, dense in bfloat16 (H100: 989).
        mfu: the part of that which the model's own operations reach.
    """

    json: bool = False
    fit: str | None = None
    nodes: int = 1
    gpus_per_node: int = 8
    memory_gib: float = 80.0
    reserved_gib: float = 1.5
    allocator_slack: float = 0.03
    node_link_gbs: float = 450.0
    network_gbs: float = 50.0
    host_link_gbs: float = 55.0
    storage_gbs: float = 5.0
    peak_tflops: float = 989.0
    mfu: float = 0.4
