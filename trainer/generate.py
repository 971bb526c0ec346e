"""Text from a model, for a look at what it has learnt; no key/value cache."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["generate"]


def generate(
    next_logits: Callable[[Tensor], Tensor],
    prompt: Sequence[int],
    *,
    tokens: int,
    context: int,
    temperature: float,
    seed: int,
    device: torch.device,
) -> list[int]:
    """Continues `prompt`, outside of autograd; every rank of a parallel model calls this with the same arguments.

    Args:
        next_logits: from ids `(1, seq)` to logits `(vocab,)` of what comes next.
        prompt: token ids, at least one.
        tokens: how many to add.
        context: the most tokens that the model looks back.
        temperature: 0 takes the likeliest token.
        seed: of the draw; the same on all ranks, so that they draw the same token.
        device: the model's.

    Returns:
        The new ids.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([list(prompt)], device=device)
    for _ in range(tokens):
        logits = next_logits(ids[:, -context:]).cpu()
        ids = torch.cat([ids, _draw(logits, temperature, generator).to(device)], dim=1)
    return ids[0, len(prompt) :].tolist()


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits.argmax().reshape(1, 1)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[None]
