"""Which parts of a sequence the ranks of context parallelism hold."""

import torch
from torch import Tensor

__all__ = ["positions_of", "sequence_chunks"]


def sequence_chunks(rank: int, ranks: int, *, balance: bool) -> list[int]:
    """Numbers of the chunks of the sequence that a rank holds: of `2 · ranks` with balance, else of `ranks`."""
    return [rank, 2 * ranks - 1 - rank] if balance else [rank]


def positions_of(rank: int, ranks: int, length: int, *, balance: bool, device: torch.device | None = None) -> Tensor:
    """The positions in the sequence of a rank's tokens, int64 `(length / ranks,)`, made on the device."""
    held = sequence_chunks(rank, ranks, balance=balance)
    size = length // (ranks * len(held))
    return torch.cat([torch.arange(p * size, (p + 1) * size, device=device) for p in held])
