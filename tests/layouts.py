"""Training steps under many layouts: several on each set of ranks, with everything that should be equal observed."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from regrow.checkpoint.format.layout import local_box
from regrow.launch.run.compose import compose_trainer
from regrow.launch.run.rank_spec import RankSpec
from regrow.launch.run.signals import StopFlag
from regrow.models.moe import MixtureOfExperts
from regrow.trainer.hook import Hook
from regrow.trainer.loop import Trainer
from regrow.trainer.parallel.context import close_parallel, open_parallel
from tests.pool import run_distributed
from tests.runs import spec_of

__all__ = ["Observed", "observe", "relative"]


@dataclass
class Observed:
    """What a layout did.

    Attributes:
        losses: of each step.
        norms: of each step's gradient, before clipping.
        exact_norms: the same from every box of the gradients once, in float64.
        first: the whole first weights.
        last: the whole weights, and the experts' biases, after the last step.
        loads: of each step, tokens per expert by layer.
        ids: of each step, the global sample ids.
        validation: the loss over the validation split after the last step.
        sample: logits after a short prompt.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    exact_norms: list[float] = field(default_factory=list)
    first: dict[str, Tensor] = field(default_factory=dict)
    last: dict[str, Tensor] = field(default_factory=dict)
    loads: list[dict[str, Tensor]] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    validation: float = 0.0
    sample: Tensor = field(default_factory=lambda: torch.empty(0))


def relative(a: float, b: float) -> float:
    """The relative difference."""
    return abs(a - b) / max(abs(b), 1e-30)


def exact_norm(trainer: Trainer) -> float:
    """Of the gradients, in float64; boxes that several ranks hold count once."""
    own = {}
    for name, parameter in trainer.model.named_parameters():
        assert parameter.grad is not None
        offset, part = box_of(parameter.grad)
        own[name, offset] = float(part.double().square().sum())
    every: list[Any] = [None] * trainer.context.world_size
    dist.all_gather_object(every, own, group=trainer.context.cpu_group)
    return math.sqrt(math.fsum({box: square for held in every for box, square in held.items()}.values()))


def box_of(tensor: Tensor) -> tuple[tuple[int, ...], Tensor]:
    """Where this rank's part of a tensor begins, and the part."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.ndim, tensor.detach()
    return local_box(tensor.shape, tensor.device_mesh, tensor.placements)[1], tensor.to_local().detach()


def whole_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """All parameters and expert biases, put together from the boxes that ranks hold; on rank 0."""
    own = {}
    for name, tensor in [*trainer.model.named_parameters(), *trainer.model.named_buffers()]:
        if not name.endswith((".load", "rope")):
            offset, part = box_of(tensor)
            # Bytes of arrays travel in a tenth of the time of tensors.
            own[name] = tuple(tensor.shape), offset, part.shape, part.dtype, part.flatten().view(torch.uint8).numpy()
    parts: list[Any] = [None] * trainer.context.world_size
    dist.gather_object(own, parts if trainer.context.is_main else None, group=trainer.context.cpu_group, group_dst=0)
    whole: dict[str, Tensor] = {}
    for held in parts if trainer.context.is_main else []:
        for name, (shape, offset, part_shape, dtype, part_bytes) in held.items():
            part = torch.from_numpy(part_bytes).view(dtype).view(part_shape)
            target = whole.setdefault(name, torch.full(shape, torch.nan, dtype=part.dtype))
            box = target[tuple(slice(o, o + n) for o, n in zip(offset, part.shape, strict=True))]
            assert bool(((box == part) | box.isnan()).all()), f"copies of {name} differ"
            box.copy_(part)
    assert not any(bool(t.isnan().any()) for t in whole.values()), "a part of a weight is nowhere"
    return whole


class Recorder(Hook):
    """Fills an `Observed`."""

    def __init__(self) -> None:
        self.seen = Observed()

    def before_fit(self, trainer: Trainer) -> None:
        self.seen.first = whole_tensors(trainer)

    def before_optimizer_step(self, trainer: Trainer) -> None:
        loads = {n: m.load.clone() for n, m in trainer.model.named_modules() if isinstance(m, MixtureOfExperts)}
        every: list[Any] = [None] * trainer.context.world_size
        dist.all_gather_object(every, loads, group=trainer.context.cpu_group)
        total: dict[str, Tensor] = {}
        for held in every:
            for name, load in held.items():
                total[name] = total.get(name, torch.zeros_like(load)) + load
        self.seen.loads.append(total)
        self.seen.exact_norms.append(exact_norm(trainer))

    def after_step(self, trainer: Trainer) -> None:
        assert trainer.batch is not None
        own = trainer.batch.ids.windows.tolist() if trainer.context.reads_first else []
        every: list[Any] = [None] * trainer.context.world_size
        dist.all_gather_object(every, own, group=trainer.context.cpu_group)
        self.seen.ids.append([i for part in every for i in part])

    def after_metrics(self, trainer: Trainer, row: Any) -> None:
        self.seen.losses.append(row["loss"])
        self.seen.norms.append(row["grad_norm"])

    def after_fit(self, trainer: Trainer) -> None:
        self.seen.last = whole_tensors(trainer)
        from regrow.trainer.hooks.config import ValidationConfig
        from regrow.trainer.hooks.validation import ValidationHook

        with trainer.evaluating():
            hook = ValidationHook(ValidationConfig(max_batches=1))
            measured = hook._measure(trainer, trainer.resources.validation[""])
            self.seen.validation = measured[0] if measured is not None else 0.0
            self.seen.sample = trainer.engine.last_logits(torch.tensor([[3, 1, 4, 1, 5]]))


def _observe(specs: Sequence[RankSpec]) -> list[Observed | str]:
    torch.set_num_threads(1)
    seen: list[Observed | str] = []
    for number, spec in enumerate(specs):
        # Each layout has its own addresses in the store that all share.
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)
        context = open_parallel(spec.layout, "cpu", 60.0)
        trainer = compose_trainer(spec, context, StopFlag(), 1)
        recorder = Recorder()
        trainer.hooks = [recorder]
        trainer.fit()
        dist.barrier()
        close_parallel()
        # A run of its own would begin with nothing compiled.
        torch._dynamo.reset()
        seen.append(recorder.seen)
    return seen if os.environ["RANK"] == "0" else []


def observe(
    layouts: Sequence[Sequence[str]], folder: Path, world_size: int, timeout_s: float = 280.0
) -> list[Observed]:
    """Trains under each of the layouts, all of `world_size` ranks, and says what happened.

    Args:
        layouts: overrides.
        folder: for the runs.
        world_size: ranks.
        timeout_s: for all together.
    """
    specs = [spec_of([*o, "checkpoint=disabled", "hooks=none"], folder, world_size) for o in layouts]
    return list(run_distributed(_observe, specs, world_size=world_size, timeout_s=timeout_s)[0])
