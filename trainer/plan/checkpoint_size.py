"""How large a checkpoint is, and how long it takes: arithmetic on stated rates."""

from dataclasses import dataclass

__all__ = ["CheckpointPlan", "plan_checkpoint"]

# What lies beside the tensors of a rank: metadata and the manifest, about.
_BESIDE = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointPlan:
    """Of one step that is saved.

    Attributes:
        bytes: on the storage, of all ranks.
        model_bytes: of them, the model's.
        rank_bytes: that a rank copies and writes, the largest.
        node_bytes: in the memory of a machine, pinned, where `async_mode` copies first.
        staging_s: the copy from the device to the host; training waits for it before its next update at most.
        write_s: from the host to the storage, beside training with the asynchronous modes.
        every_steps: steps between saves.
    """

    bytes: int
    model_bytes: int
    rank_bytes: int
    node_bytes: int
    staging_s: float
    write_s: float
    every_steps: int


def plan_checkpoint(
    *,
    model_bytes: int,
    optimizer_bytes: int,
    writers: int,
    ranks_per_node: int,
    nodes: int,
    model_only: bool,
    staged: bool,
    every_steps: int,
    host_link_gbs: float,
    storage_gbs: float,
) -> CheckpointPlan:
    """The plan of a save.

    Args:
        model_bytes: of the whole model, as it is kept.
        optimizer_bytes: of its optimizer's state.
        writers: ranks that share the bytes: what is replicated is written once, spread over all.
        ranks_per_node: of a machine.
        nodes: machines.
        model_only: whether the optimizer stays away.
        staged: whether a copy lies in the host's memory.
        every_steps: steps between saves.
        host_link_gbs: GB/s from a device to the host.
        storage_gbs: GB/s of a machine to the storage.
    """
    size = model_bytes + (0 if model_only else optimizer_bytes)
    rank = -(-size // writers)
    per_node = min(ranks_per_node, writers)
    return CheckpointPlan(
        bytes=size + _BESIDE * writers,
        model_bytes=model_bytes,
        rank_bytes=rank,
        node_bytes=rank * per_node if staged else 0,
        staging_s=rank / (host_link_gbs * 1e9),
        write_s=size / (storage_gbs * 1e9 * nodes),
        every_steps=every_steps,
    )
