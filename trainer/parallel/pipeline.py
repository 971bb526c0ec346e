"""The pipeline: stages of torch.distributed.pipelining for training, and one after the other without gradients.

The schedules get micro-batches as they are (no splitting), sums of losses (no scaling) and the shapes that are sent,
so that nothing is run to infer them.
"""

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from regrow.torch_compat import pipelining, set_micro_batches
from regrow.trainer.config import PipelineSchedule
from regrow.trainer.parallel.stages import StagePlan

__all__ = ["Pipeline", "StageInput"]

# Tokens, the model's other arguments, and labels, of one micro-batch.
StageInput = tuple[Tensor, dict[str, Any], Tensor]


@final
class Pipeline:
    """This rank's stages.

    Args:
        parts: this rank's stages as models.
        stages: where all of them are.
        schedule: of training.
        group: the ranks of the pipeline.
        device: where this rank computes.
        hidden_shape: of what one stage gives to the next, for a micro-batch's tokens.
        result: shape and dtype of the last stage's output, likewise.
        dtype: of what leaves the other stages.
        loss: of the last stage's output and the labels.
    """

    def __init__(
        self,
        parts: Sequence[nn.Module],
        stages: StagePlan,
        schedule: PipelineSchedule,
        group: dist.ProcessGroup,
        device: torch.device,
        *,
        hidden_shape: Callable[[Tensor], tuple[int, ...]],
        result: Callable[[Tensor], tuple[tuple[int, ...], torch.dtype]],
        dtype: torch.dtype,
        loss: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        self._parts, self._stages, self._group, self._device = parts, stages, group, device
        self._kind, self._dtype, self._loss = schedule, dtype, loss
        self._hidden_shape, self._result = hidden_shape, result
        self._rank = dist.get_rank(group)
        self._built: dict[tuple[int, torch.Size], Any] = {}

    def train(self, inputs: Sequence[StageInput]) -> None:
        """Forward and backward passes of all micro-batches; `loss` is called on the rank with the last stage."""
        tokens = inputs[0][0]
        key = (len(inputs), tokens.shape)
        if key not in self._built:
            self._built[key] = self._build(len(inputs), tokens)
        schedule = self._built[key]
        arguments: list[Any] = [(t,) for t, _, _ in inputs] if self._has(0) else [()] * len(inputs)
        options = [o for _, o, _ in inputs]
        set_micro_batches(schedule, arguments, options)
        if self._has(self._stages.count - 1):
            schedule.step(target=torch.cat([label for _, _, label in inputs]), losses=[], return_outputs=False)
        else:
            schedule.step(return_outputs=False)

    def _has(self, stage: int) -> bool:
        return stage in self._stages.mine

    def _build(self, micro_batches: int, tokens: Tensor) -> Any:
        count = self._stages.count
        hidden = torch.empty(self._hidden_shape(tokens), dtype=self._dtype, device="meta", requires_grad=True)
        shape, dtype = self._result(tokens)
        result = torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
        known = pipelining()
        made = [
            known.PipelineStage(
                part,
                number,
                count,
                self._device,
                input_args=(tokens.to("meta") if number == 0 else hidden,),
                output_args=(result if number == count - 1 else hidden,),
                group=self._group,
            )
            for part, number in zip(self._parts, self._stages.mine, strict=True)
        ]
        kind = known.schedules.get_schedule_class(self._kind.value)
        several = issubclass(kind, known.schedules.PipelineScheduleMulti)
        return kind(made if several else made[0], micro_batches, loss_fn=self._loss, scale_grads=False)

    def forward(self, tokens: Tensor, options: dict[str, Any]) -> Tensor | None:
        """One forward pass through all stages, outside of autograd; the result where the last stage is."""
        h: Tensor | None = None
        for part, number in zip(self._parts, self._stages.mine, strict=True):
            if number == 0:
                given = tokens
            elif self._stages.ranks[number - 1] == self._rank and h is not None:
                given = h
            else:
                given = torch.empty(self._hidden_shape(tokens), dtype=self._dtype, device=self._device)
                dist.recv(given, group=self._group, group_src=self._stages.ranks[number - 1])
            h = part(given, **options)
            assert h is not None
            following = number + 1
            if following < self._stages.count and self._stages.ranks[following] != self._rank:
                dist.send(h.contiguous(), group=self._group, group_dst=self._stages.ranks[following])
        return h if self._has(self._stages.count - 1) else None
