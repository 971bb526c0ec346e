"""What the trainer asks of a model."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from regrow.models.config import ModelConfig
from regrow.models.generation.generate import Completion, Request, check_prompts, generate, next_logits_of
from regrow.models.generation.sampling import Sampling
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
        config: that it was made from.
        compute_dtype: of the activations and of the products, for which weights are cast; None means the parameters'
            own.
        keeps_keys: whether `mask` may be a `KeyValueCache`, so that the model can be asked for one position after
            another.
    """

    config: ModelConfig
    compute_dtype: torch.dtype | None = None
    keeps_keys: bool = False

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

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop_ids: Collection[int] = (),
        logprobs: int | None = None,
        batch_size: int = 0,
        ends: Callable[[int, int], bool] | None = None,
    ) -> list[Completion]:
        """Continues prompts of any lengths together, with keys and values kept.

        A prompt's tokens are the same whatever stands beside it, but as far as a product's rounding depends on the
        number of rows.

        Args:
            prompts: token ids, at least one each and fewer than `config.max_seq_len`.
            max_tokens: the most that are added to each.
            temperature: see `Sampling`, as of those up to `seed`; 0 takes the likeliest token.
            top_k: the likeliest tokens that may be drawn.
            top_p: the part of the probability that may be drawn.
            min_p: the least probability, as a part of the likeliest one's.
            repetition_penalty: of tokens that occurred.
            seed: of the draws; with it a prompt's text is always the same.
            stop_ids: tokens that end a row.
            logprobs: tokens besides the one that is taken whose logarithms of probability are told for each place.
            batch_size: rows that are computed together; 0 is all.
            ends: told of each new token as it is made, with the number of its prompt; true ends that row.

        Returns:
            A completion for each prompt.

        Raises:
            ConfigError: a prompt or an option cannot be, or the model keeps no keys.
        """
        sampling = Sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
        request = Request(
            max_tokens=max_tokens,
            sampling=sampling,
            stop_ids=frozenset(stop_ids),
            logprobs=logprobs,
            batch_size=batch_size,
        )
        request.check()
        context = self.config.max_seq_len
        check_prompts(prompts, self.config.vocab_size, context)
        device = next(self.parameters()).device
        return generate(next_logits_of(self), prompts, request, context=context, device=device, ends=ends)
