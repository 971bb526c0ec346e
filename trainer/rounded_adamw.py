"""AdamW on bfloat16 parameters and moments: computed in float32, rounded stochastically where it is written back.

Moments need it as much as parameters do: with beta2=0.999 a step changes `exp_avg_sq` by a thousandth, which
bfloat16, whose numbers lie a 128th to a 256th apart, would round away for ever.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from regrow.torch_compat import foreach_add
from regrow.trainer.config import AdamWConfig
from regrow.trainer.rounding import Coordinates, coordinates_of, random_words, round_to_bfloat16, words_of_name
from regrow.trainer.shards import local_part, shard_offset

__all__ = ["RoundedAdamW", "compiled_update"]

# Elements at a time on a CPU: what is computed on the way stays in its cache.
_CHUNK = 1 << 15


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """What the random bits of a parameter depend on, beside the step."""

    at: Coordinates
    words: Tensor


@final
class RoundedAdamW:
    """The update of this rank's shards.

    Args:
        config: see `AdamWConfig`.
        parameters: bfloat16, by name.
        seed: the run's.
    """

    def __init__(self, config: AdamWConfig, parameters: Mapping[str, nn.Parameter], seed: int) -> None:
        self._config = config
        self._places = {name: _place(name, parameter, seed) for name, parameter in parameters.items()}

    def step(
        self,
        names: Sequence[str],
        tensors: Sequence[Sequence[Tensor]],
        steps: Sequence[Tensor],
        *,
        lr: float,
        weight_decay: float,
        grad_scale: Tensor,
        skip: Tensor,
    ) -> None:
        """One update, in place.

        Args:
            names: of the parameters.
            tensors: of each its shard, the shards of both moments, and that of the gradient.
            steps: updates of each so far, float32 scalars.
            lr: the learning rate.
            weight_decay: decoupled.
            grad_scale: float64 scalar on the device; gradients are divided by it.
            skip: scalar on the device; 1 leaves everything as it is.
        """
        c, device = self._config, skip.device
        foreach_add(list(steps), 1.0 - skip.to(torch.float32))
        count = torch.stack(list(steps)).to(torch.float64)
        # A parameter that has had no update yet is left as it is, and its numbers are not looked at.
        sizes = (lr / (1.0 - c.beta1**count)).to(torch.float32)
        corrections = (1.0 - c.beta2**count).sqrt().to(torch.float32)
        decay = torch.full((), 1.0 - lr * weight_decay, dtype=torch.float32, device=device)
        inverse = grad_scale.reciprocal().to(torch.float32)
        apply = compiled_update("inductor") if device.type == "cuda" else _in_chunks
        for i, (name, own) in enumerate(zip(names, tensors, strict=True)):
            if own[0].numel() == 0:
                continue
            place = self._places[name]
            columns = place.at.columns.numel()
            # Detached: a compiler looks at what a view is a view of, and a gradient of another type makes it fail.
            matrices = [*(t.detach().view(-1, columns) for t in own[:3]), own[3].reshape(-1, columns)]
            numbers = (count[i].to(torch.int32), skip, inverse, sizes[i], decay, corrections[i])
            apply(matrices, place.at, place.words, numbers, c.beta1, c.beta2, c.eps)


def _place(name: str, parameter: nn.Parameter, seed: int) -> _Place:
    local = local_part(parameter)
    at = coordinates_of(local.shape, shard_offset(parameter), parameter.shape, local.device)
    return _Place(at=at, words=words_of_name(seed, name, local.device))


def _in_chunks(own: Sequence[Tensor], at: Coordinates, *rest: Any) -> None:
    """`_update` on some rows at a time."""
    total, columns = own[0].shape
    rows = max(1, _CHUNK // columns)
    for first in range(0, total, rows):
        here = slice(first, first + rows)
        _update([t[here] for t in own], at.rows[here], at.columns, *rest)


def _update(
    own: Sequence[Tensor],
    rows: Tensor,
    columns: Tensor,
    words: Tensor,
    numbers: Sequence[Tensor],
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """AdamW of one matrix; each operation rounds by itself, so that no element's result depends on where it lies.

    Args:
        own: parameter, both moments, gradient, of one shape.
        rows: see `Coordinates`.
        columns: see `Coordinates`.
        words: see `words_of_name`.
        numbers: scalars: the step, whether it is skipped, what gradients are multiplied by, the step's size, what the
            parameter is multiplied by, and the root of the second moment's correction.
        beta1: of the first moment.
        beta2: of the second.
        eps: added to the root.
    """
    p, m, v, g = own
    step, skip, inverse_scale, size, decay, correction = numbers
    grad = g.to(torch.float32) * inverse_scale
    first = m.to(torch.float32) * beta1 + grad * (1.0 - beta1)
    second = v.to(torch.float32) * beta2 + grad * grad * (1.0 - beta2)
    moved = p.to(torch.float32) * decay - first / (second.sqrt() / correction + eps) * size
    z, w = random_words(Coordinates(rows=rows, columns=columns), words, step)
    kept = skip != 0
    for old, new, bits in ((p, moved, z), (m, first, z >> 16), (v, second, w)):
        old.copy_(torch.where(kept, old, round_to_bfloat16(new, bits)))


@functools.cache
def compiled_update(backend: str) -> Callable[..., None]:
    """`_update` as one kernel for all shapes, for GPUs."""
    kernel = torch.compile(_update, dynamic=True, fullgraph=True, backend=backend)
    return lambda own, at, *rest: kernel(own, at.rows, at.columns, *rest)
