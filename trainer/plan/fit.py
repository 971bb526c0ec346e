"""A search for layouts that fit: estimates say what is fast, dry runs say what fits."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from regrow.errors import ConfigError
from regrow.models.config import DecoderConfig
from regrow.trainer.config import ActivationCheckpoint
from regrow.trainer.parallel.layout import Layout
from regrow.trainer.plan.config import PlanConfig
from regrow.trainer.plan.dry_run import Step
from regrow.trainer.plan.mesh import axes_of
from regrow.trainer.plan.plan import RankMemory, with_layout
from regrow.trainer.plan.step_time import bubble, recomputed

__all__ = ["Cluster", "Estimate", "Fit", "candidates", "estimate", "read_cluster", "search"]

_GIB = 2**30
_BEST = 5
# Sequences below this are not split: a rank has room for a whole one.
_LONG = 32768
_MODES = (ActivationCheckpoint.none, ActivationCheckpoint.selective, ActivationCheckpoint.full)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Machines that are alike.

    Attributes:
        nodes: how many.
        gpus: of each.
        gib: of a GPU's memory.
    """

    nodes: int
    gpus: int
    gib: float


def read_cluster(text: str) -> Cluster:
    """Reads NODES×GPUS×GiB.

    Raises:
        ConfigError: it is something else.
    """
    found = re.fullmatch(r"(\d+)[x×](\d+)[x×](\d+(?:\.\d+)?)", text.strip())
    if found is None or not (int(found[1]) and int(found[2]) and float(found[3])):
        raise ConfigError(
            f"plan.fit must be NODESxGPUSxGIB, three numbers above 0, but is {text!r}; use 1x8x80 for one machine "
            "with 8 GPUs of 80 GiB"
        )
    return Cluster(nodes=int(found[1]), gpus=int(found[2]), gib=float(found[3]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """How long a step takes, about: to put layouts in order.

    Attributes:
        seconds: of a step.
        reasons: what it is made of, in words.
    """

    seconds: float
    reasons: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """A layout that fits.

    Attributes:
        layout: the degrees.
        activation_checkpoint: what is computed again.
        estimate: of its time.
        memory: of its fullest rank.
    """

    layout: Layout
    activation_checkpoint: ActivationCheckpoint
    estimate: Estimate
    memory: RankMemory

    @property
    def overrides(self) -> list[str]:
        """What a command says for it."""
        degrees = [f"parallel.{name}={n}" for name, n in self.layout.as_dict().items() if n > 1 or name == "dp_shard"]
        return [*degrees, f"train.activation_checkpoint={self.activation_checkpoint.name}"]


def candidates(model: DecoderConfig, cluster: Cluster, global_batch_size: int, seq_len: int) -> Iterator[Layout]:
    """Layouts of all GPUs that are worth a look: tensor parallelism within a machine, whole batches for each rank.

    Args:
        model: its dimensions.
        cluster: the machines.
        global_batch_size: sequences of a step.
        seq_len: tokens of a sequence.
    """
    world = cluster.nodes * cluster.gpus
    for tp in _divisors(cluster.gpus):
        for cp in _divisors(world // tp) if seq_len >= _LONG else [1]:
            for pp in _divisors(world // tp // cp):
                data = world // tp // cp // pp
                if pp > model.n_layers or global_batch_size % data:
                    continue
                for replicas in _divisors(min(data, cluster.nodes)):
                    if data % replicas == 0:
                        shards = data // replicas
                        for ep in _expert_degrees(model, shards * cp * tp):
                            yield Layout(dp_replicate=replicas, dp_shard=shards, tp=tp, pp=pp, cp=cp, ep=ep)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _expert_degrees(model: DecoderConfig, sharing: int) -> list[int]:
    return [d for d in _divisors(sharing) if model.n_experts % d == 0] if model.n_experts else [1]


def estimate(step: Step, machine: PlanConfig, flops_per_token: float, parameters: int) -> Estimate:
    """The time of a step: operations at the stated MFU, what is computed again, and what ranks wait for.

    Args:
        step: with its layout.
        machine: its rates.
        flops_per_token: of the model.
        parameters: of the whole model.
    """
    layout, batch = step.layout, step.batch
    links = {axis.name: axis.links for axis in axes_of(layout, machine.gpus_per_node)}

    def seconds_over(axis: str, size: float) -> float:
        rate = machine.node_link_gbs if links.get(axis) == "NVLink" else machine.network_gbs
        return size / (rate * 1e9)

    count = batch.micro_batches(layout.data_ranks)
    tokens = batch.global_batch_size * batch.seq_len
    again = recomputed(step.train.activation_checkpoint, step.train.activation_memory_budget)
    compute = flops_per_token * tokens * (1 + again) / (layout.world_size * machine.peak_tflops * 1e12 * machine.mfu)
    own = tokens / (layout.data_ranks * layout.cp)
    layers = step.model.n_layers / layout.pp
    hidden = own * step.model.dim * 2 * layers
    tensor = 8 * (layout.tp - 1) / layout.tp * seconds_over("tp", hidden) if layout.tp > 1 else 0.0
    context = 6 * seconds_over("cp", hidden) if layout.cp > 1 else 0.0
    experts = 4 * seconds_over("ep", hidden) if layout.ep > 1 else 0.0
    held = parameters / (layout.tp * layout.pp)
    # Gathered for the forward and the backward pass, and gradients scattered in float32, beside the products.
    passes = count if layout.pp == 1 else 1
    shards = layout.dp_shard * layout.cp
    gathering = seconds_over("dp_shard", held * (4 * passes + 4 * passes) * (shards - 1) / shards)
    replicas = seconds_over("dp_replicate", held * 8 / shards) if layout.dp_replicate > 1 else 0.0
    waiting = bubble(layout, step.parallel, count)
    seconds = (max(compute, gathering) + tensor + context + experts + replicas) / (1 - waiting)
    reasons = [f"{compute:.2f} s of operations"]
    reasons += ["a third more is computed again"] if again else []
    reasons += [f"gathering parameters takes {gathering:.2f} s, longer than those"] if gathering > compute else []
    for name, what, time in (("tp", "tensor", tensor), ("cp", "context", context), ("ep", "expert", experts)):
        if time:
            reasons.append(f"{what} parallelism waits {time:.2f} s for {links.get(name, 'network')}")
    reasons += [f"stages wait {waiting:.0%} of the time"] if waiting else []
    return Estimate(seconds=seconds, reasons=tuple(reasons))


def search(
    step: Step,
    machine: PlanConfig,
    cluster: Cluster,
    *,
    flops_per_token: float,
    parameters: int,
    state_bytes: int,
    valid: Callable[[Step], bool],
    memory_of: Callable[[Step], RankMemory],
    most: int = 30,
) -> list[Fit]:
    """The fastest layouts that fit, the best first, at most five; of each layout, the least that must be recomputed.

    Args:
        step: with any layout.
        machine: its rates; its memory is the cluster's.
        cluster: the machines.
        flops_per_token: of the model.
        parameters: of the whole model.
        state_bytes: of a parameter with its gradient and its optimizer's state.
        valid: whether a run would be allowed.
        memory_of: the memory of the fullest rank of a step; takes seconds.
        most: layouts of which the memory is looked at.
    """
    tried: list[tuple[float, Step, Estimate]] = []
    batch = step.batch
    for layout in candidates(step.model, cluster, batch.global_batch_size, batch.seq_len):
        for mode in _MODES:
            one = with_layout(replace(step, train=replace(step.train, activation_checkpoint=mode)), layout)
            least = least_bytes(one, parameters, state_bytes)
            if least <= cluster.gib * _GIB and valid(one):
                found = estimate(one, machine, flops_per_token, parameters)
                tried.append((found.seconds, one, found))
    tried.sort(key=lambda entry: (entry[0], _MODES.index(entry[1].train.activation_checkpoint)))
    fits: list[Fit] = []
    for _, one, found in tried[:most]:
        if any(fit.layout == one.layout for fit in fits):
            continue
        memory = memory_of(one)
        if memory.fits:
            mode = one.train.activation_checkpoint
            fits.append(Fit(layout=one.layout, activation_checkpoint=mode, estimate=found, memory=memory))
        if len(fits) == _BEST:
            break
    return fits


def least_bytes(step: Step, parameters: int, state_bytes: int) -> float:
    """What a rank needs in any case, from below: to look no further at what is far too large.

    Args:
        step: with its layout.
        parameters: of the whole model.
        state_bytes: of a parameter with its gradient and its optimizer's state.
    """
    layout, model, batch = step.layout, step.model, step.batch
    shards = layout.dp_shard * layout.cp
    state = parameters / (layout.tp * layout.pp * shards) * state_bytes
    rows = min(batch.micro_batch_size, -(-batch.global_batch_size // layout.data_ranks))
    tokens = rows * batch.seq_len / layout.cp
    heads, keys = model.n_heads * model.head_width, model.n_kv_heads * model.head_width
    # Kept for each token by a block, in elements: what a compiler keeps of a dense block, its products, its input.
    width = {
        ActivationCheckpoint.none: (4 * model.dim + 2 * heads + 2 * keys + 3 * model.ffn_dim) / layout.tp,
        ActivationCheckpoint.selective: (2 * model.dim + 2 * heads + 2 * keys + 2 * model.ffn_dim) / layout.tp,
    }.get(step.train.activation_checkpoint, model.dim / layout.tp)
    # The first stage of a pipeline holds as many micro-batches as there are stages.
    return state + 0.9 * tokens * width * 2 * model.n_layers
