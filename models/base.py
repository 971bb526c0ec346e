"""What the trainer asks of a model."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from regrow.models.init import InitRule
from regrow.models.plan import ShardingPlan

__all__ = ["LanguageModel", "OutputLoss"]

# The loss, from hidden states `(batch, seq, dim)` and the output layer that they would go through.
OutputLoss = Callable[[Tensor, nn.Module], Tensor]


class LanguageModel(nn.Module, ABC):
    """A decoder-only language model on one device; it may be made on the meta device.

    Parameters are filled from `init_rules` by name and buffers by `init_buffers`, so that a model made on
    the meta device and then sharded starts with the same weights as one made whole.

    Attributes:
        compute_dtype: of the activations and of the products, for which weights are cast; None means the parameters'
            own.
    """

    compute_dtype: torch.dtype | None = None

    @abstractmethod
    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Logits for every position; of a part of the model, what its last layer gives.

        A model may take `output_loss: OutputLoss | None = None` besides. Where it is given, it is called in place of
        the output layer, and what it returns is returned, so that the loss can be had without the logits (`Decoder`
        does that). A part without the output layer ignores it. A model that does not take it is asked for its logits.

        Args:
            tokens: int64 `(batch, seq)`; for a part without the embedding `(batch, seq, dim)` from the part before.
            mask: bool, broadcastable to `(batch, heads, seq, seq)`, true where attention is allowed; None
                means causal.
            positions: int64 `(seq,)` or `(batch, seq)`, each token's position in its sequence; None means 0, 1, ….
            valid: bool `(batch, seq)`, false for padding; None means that all count.

        Returns:
            `(batch, seq, vocab)` in the compute dtype.
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
    def part(self, layers: Sequence[int], *, first: bool, last: bool) -> Self:
        """A model of some of the layers, with the embedding (`first`) and the output (`last`) or without.

        It shares its modules with this one, and its parameters keep the names they have in the whole.
        """

    @abstractmethod
    def plan(self) -> ShardingPlan:
        """How the model may be split over ranks."""

    @abstractmethod
    def vocabulary_parameters(self) -> tuple[str, ...]:
        """Names of the parameters whose rows are tokens; of the whole model, and tied ones once."""

    @abstractmethod
    def tied_parameters(self) -> tuple[str, ...]:
        """Names of the parameters that both the first and the last part use; of the whole model."""

    @abstractmethod
    def decays(self, name: str) -> bool:
        """Whether weight decay acts on this parameter."""

    @abstractmethod
    def flops_per_token(self, seq_len: int) -> float:
        """Floating-point operations of one training token, forward and backward, without recomputation."""
