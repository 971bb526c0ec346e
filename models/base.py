"""What the trainer asks of a model."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from models.init import InitRule

__all__ = ["LanguageModel"]


class LanguageModel(nn.Module, ABC):
    """A decoder-only language model on one device; it may be made on the meta device.

    Parameters are filled from `init_rules` by name and buffers by `init_buffers`, so that a model made on
    the meta device and then sharded starts with the same weights as one made whole.
    """

    @abstractmethod
    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits for every position.

        Args:
            tokens: int64 `(batch, seq)`.
            mask: bool, broadcastable to `(batch, heads, seq, seq)`, true where attention is allowed; None
                means causal.

        Returns:
            `(batch, seq, vocab)` in the parameters' compute dtype.
        """

    @abstractmethod
    def init_rules(self) -> dict[str, InitRule]:
        """How each parameter starts, by fully qualified name; tied parameters appear once."""

    @abstractmethod
    def init_buffers(self, device: torch.device, length: int) -> None:
        """Computes what is derived from the config alone, on `device`: tables for `length` positions."""

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The repeated layers, in order: the units of FSDP, compilation and activation checkpointing."""

    @abstractmethod
    def decays(self, name: str) -> bool:
        """Whether weight decay acts on this parameter."""

    @abstractmethod
    def flops_per_token(self, seq_len: int) -> float:
        """Floating-point operations of one training token, forward and backward, without recomputation."""
