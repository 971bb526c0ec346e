"""A plan in words, for a terminal."""

from collections.abc import Iterator, Sequence

from regrow.trainer.plan.config import PlanConfig
from regrow.trainer.plan.fit import Fit
from regrow.trainer.plan.plan import RankMemory, RunPlan

__all__ = ["fits_as_text", "plan_as_text"]

_GIB, _MIB = 2**30, 2**20
_PARTS = {
    "loss": "in the loss",
    "update": "in the optimizer's update",
    "forward first": "at the start of the forward pass",
    "forward middle": "in the forward pass",
    "forward last": "at the end of the forward pass",
    "backward last": "at the start of the backward pass",
    "backward middle": "in the backward pass",
    "backward first": "at the end of the backward pass",
}


def size(n: float) -> str:
    """Bytes, in the unit that suits them."""
    return f"{n / _GIB:,.2f} GiB" if n >= _GIB else f"{n / _MIB:,.1f} MiB"


def plan_as_text(plan: RunPlan, machine: PlanConfig) -> str:
    """All of a plan.

    Args:
        plan: of a run.
        machine: what was assumed.
    """
    lines = [*_head(plan), "", *_mesh(plan, machine), "", *_memory(plan, machine), "", *_rest(plan, machine)]
    return "\n".join(lines)


def _head(plan: RunPlan) -> Iterator[str]:
    where = "CPUs" if plan.device_type == "cpu" else "GPUs"
    yield f"{plan.model}: {plan.parameters:,} parameters; {plan.layout.world_size} rank(s) on {where}, {plan.layout}"


def _mesh(plan: RunPlan, machine: PlanConfig) -> Iterator[str]:
    if not plan.axes:
        yield "mesh: one rank"
        return
    yield f"mesh, with {machine.gpus_per_node} ranks to a machine, from the outermost axis:"
    for axis in plan.axes:
        shown = ", ".join(map(str, axis.first_group[:4])) + (", …" if len(axis.first_group) > 4 else "")
        yield f"  {axis.name} {axis.ranks}, over {axis.links}: {axis.carries} (rank 0 with {shown})"


def _memory(plan: RunPlan, machine: PlanConfig) -> Iterator[str]:
    for rank in plan.ranks:
        place = ", ".join(f"{name} {n}" for name, n in rank.coordinates.items())
        yield (
            f"rank {rank.rank}{f' ({place})' if place else ''}: {sum(rank.layers)} layers, "
            f"{rank.parameters:,} parameters; most memory {_PARTS.get(rank.part, rank.part)}:"
        )
        for kind, amount in sorted(rank.kinds.items(), key=lambda item: -item[1]):
            if amount >= rank.live / 1000:
                yield f"  {kind:<20} {size(amount):>12}"
        yield f"  {'live at the peak':<20} {size(rank.live):>12}"
        if plan.device_type == "cuda":
            yield from _on_gpu(rank, machine)
        if rank.host:
            yield f"  {'in host memory':<20} {size(rank.host):>12}"


def _on_gpu(rank: RankMemory, machine: PlanConfig) -> Iterator[str]:
    slack = machine.allocator_slack * rank.live
    yield f"  {'allocator slack':<20} {size(slack):>12}"
    yield f"  {'context and NCCL':<20} {size(machine.reserved_gib * _GIB):>12}"
    verdict = "fits" if rank.fits else "DOES NOT FIT"
    yield f"  {'in all':<20} {size(rank.total):>12}  of {machine.memory_gib:g} GiB: {verdict}"


def _rest(plan: RunPlan, machine: PlanConfig) -> Iterator[str]:
    saved, time = plan.checkpoint, plan.time
    if saved is None:
        yield "checkpoint: none"
    else:
        yield (
            f"checkpoint: {size(saved.bytes)} every {saved.every_steps} steps; a rank copies "
            f"{size(saved.rank_bytes)} in {saved.staging_s:.2f} s at {machine.host_link_gbs:g} GB/s "
            f"({size(saved.node_bytes)} of a machine's memory) and all write for {saved.write_s:.1f} s "
            f"at {machine.storage_gbs:g} GB/s a machine"
        )
    batches = f"{time.micro_batches} micro-batch(es) a rank"
    yield f"a step: {time.tokens:,} tokens in {batches}, {time.flops:.3g} operations"
    if plan.device_type == "cuda":
        yield (
            f"at {machine.mfu:.0%} MFU of {machine.peak_tflops:g} TFLOP/s: {time.seconds:.2f} s a step, "
            f"{time.tokens_per_s:,.0f} tokens/s"
            + (f"; stages of the pipeline wait {time.bubble:.0%} of it" if time.bubble else "")
        )
    if time.recomputed:
        yield f"recomputation adds {time.recomputed:.0%} to the operations, which MFU does not count"


def fits_as_text(cluster: str, fits: Sequence[Fit]) -> str:
    """The layouts that a search found.

    Args:
        cluster: as the command says it.
        fits: the best first.
    """
    if not fits:
        return (
            f"nothing that was looked at fits on {cluster}; try a smaller data.micro_batch_size, "
            "precision=bf16_params, train.offload_optimizer=true, or more GPUs"
        )
    lines = [f"the fastest of the layouts that fit on {cluster}, by estimate:"]
    for number, fit in enumerate(fits, 1):
        lines.append(f"{number}. {' '.join(fit.overrides)}")
        lines.append(
            f"   {size(fit.memory.total)} of memory, {fit.estimate.seconds:.2f} s a step: "
            f"{'; '.join(fit.estimate.reasons)}"
        )
    return "\n".join(lines)
