"""Continuing prompts, many at a time, with keys and values kept.

Shapes: B rows, T positions, V vocabulary.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol, final

import numpy as np
import torch
from torch import Tensor, nn

from regrow.errors import ConfigError
from regrow.models.generation.sampling import Sampling, draw, filtered, penalised, row_generator
from regrow.models.key_value_cache import KeyValueCache

__all__ = ["Completion", "EndReason", "NextLogits", "Request", "check_prompts", "generate", "next_logits_of"]

# Of the rows that were begun, the part that has ended before those are left out of the computation.
_ENDED = 0.5


class EndReason(Enum):
    """Why a row ended: a token or text that ends it, `max_tokens`, or the longest sequence that the model takes."""

    stop = "stop"
    length = "length"
    context = "context"


class NextLogits(Protocol):
    """A model as generation asks for it."""

    def __call__(self, tokens_BT: Tensor, positions_BT: Tensor, cache: KeyValueCache) -> Tensor:
        """Logits of what follows the last of these positions, float32 or better `(B, V)`.

        Args:
            tokens_BT: int64, the new ones.
            positions_BT: int64, where each stands in its row.
            cache: with all positions before them, and room for these.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What is wanted of each prompt.

    Attributes:
        max_tokens: the most that are added.
        sampling: how they are chosen.
        stop_ids: tokens that end a row; they are its last.
        logprobs: tokens besides the one that is taken whose logarithms of probability are told for each place, the
            likeliest; None tells none at all.
        batch_size: rows that are computed together; 0 is all.
    """

    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    batch_size: int = 0

    def check(self, prefix: str = "") -> None:
        """Checks the fields; see `Sampling.check`."""
        self.sampling.check(prefix)
        for name, low, remedy in (("max_tokens", 1, "64"), ("logprobs", 0, "5"), ("batch_size", 0, "0 for all")):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"{prefix}{name} must be at least {low}, but is {value}; use {remedy}")


@dataclass(kw_only=True, slots=True)
class Completion:
    """What was added to a prompt.

    Attributes:
        ids: the new tokens.
        logprobs: natural logarithms of their probabilities by the model, before any filter.
        alternatives: the likeliest tokens of each place, with those logarithms.
        reason: why it ended.
    """

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    alternatives: list[list[tuple[int, float]]] = field(default_factory=list)
    reason: EndReason = EndReason.length


def next_logits_of(model: nn.Module) -> NextLogits:
    """A model in this process, whole.

    Raises:
        ConfigError: its layers keep no keys and values.
    """
    if not getattr(model, "keeps_keys", False):
        raise ConfigError(
            f"the model must keep keys and values (keeps_keys), but {type(model).__name__} does not; build its "
            "layers of regrow.models.layers.Attention and say so"
        )
    # The output layer is needed for the last position alone.
    in_model = "output_loss" in inspect.signature(model.forward).parameters

    def call(tokens_BT: Tensor, positions_BT: Tensor, cache: KeyValueCache) -> Tensor:
        more = {"output_loss": lambda h_BTD, output: output(h_BTD[:, -1:])} if in_model else {}
        logits_BTV: Tensor = model(tokens_BT, mask=cache, positions=positions_BT, **more)
        logits_BV = logits_BTV[:, -1]
        return logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))

    return call


def check_prompts(prompts: Sequence[Sequence[int]], vocabulary: int, context: int) -> None:
    """Checks prompts before anything is computed.

    Args:
        prompts: token ids.
        vocabulary: ids that the model knows.
        context: the longest sequence that it takes.

    Raises:
        ConfigError: naming the prompt, rule, value and remedy.
    """
    for number, prompt in enumerate(prompts, 1):
        name = f"prompt {number}" if len(prompts) > 1 else "the prompt"
        if not prompt:
            raise ConfigError(
                f"{name} must have at least one token, but has none; write a word, or begin with a token"
            )
        if len(prompt) >= context:
            raise ConfigError(
                f"{name} must be shorter than the longest sequence that the model takes ({context} tokens), but has "
                f"{len(prompt)}; shorten it"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            worst = max(prompt, key=lambda i: (i < 0, i))
            raise ConfigError(
                f"{name} must be of the model's {vocabulary} tokens, but holds {worst}; use the model's own tokenizer"
            )


@dataclass(slots=True)
class _Row:
    """A prompt that is being continued.

    Attributes:
        number: among the prompts.
        prompt: its ids.
        random: its numbers.
        made: so far.
    """

    number: int
    prompt: Sequence[int]
    random: np.random.Generator
    made: Completion = field(default_factory=Completion)


def generate(
    next_logits: NextLogits,
    prompts: Sequence[Sequence[int]],
    request: Request,
    *,
    context: int,
    device: torch.device,
    ends: Callable[[int, int], bool] | None = None,
) -> list[Completion]:
    """Continues each prompt; under autograd's `no_grad` or `inference_mode`, which the caller chooses.

    A row's tokens do not depend on the rows beside it, but as far as a product's rounding depends on their number.

    Args:
        next_logits: the model.
        prompts: token ids, at least one each and fewer than `context`.
        request: what is wanted.
        context: the longest sequence that the model takes.
        device: the model's.
        ends: told of each new token, with the number of its prompt; true ends the row.

    Returns:
        A completion for each prompt.
    """
    repeats = Counter[tuple[int, ...]]()
    rows: list[_Row] = []
    for number, prompt in enumerate(prompts):
        key = tuple(prompt)
        rows.append(_Row(number, prompt, row_generator(request.sampling.seed, prompt, repeats[key])))
        repeats[key] += 1
    # Rows of about the same length together, so that little is padding.
    order = sorted(rows, key=lambda row: -len(row.prompt))
    size = request.batch_size or len(order)
    for start in range(0, len(order), max(1, size)):
        _Batch(order[start : start + size], request, context, device).run(next_logits, ends)
    return [row.made for row in rows]


@final
class _Batch:
    """Rows that are computed together, the longest prompt first."""

    def __init__(self, rows: list[_Row], request: Request, context: int, device: torch.device) -> None:
        self._rows, self._request, self._context, self._device = rows, request, context, device
        longest, shortest = len(rows[0].prompt), len(rows[-1].prompt)
        padding_B = torch.tensor([longest - len(row.prompt) for row in rows], device=device)
        # A row ends with the context; the shortest has the most padding before it.
        self._cache = KeyValueCache(padding_B, min(longest + request.max_tokens, context + longest - shortest))
        tokens = [[0] * (longest - len(row.prompt)) + list(row.prompt) for row in rows]
        self._tokens_BT = torch.tensor(tokens, device=device)
        self._positions_BT = (torch.arange(longest, device=device) - padding_B[:, None]).clamp(min=0)
        self._occurred_BV: Tensor | None = None

    def run(self, next_logits: NextLogits, ends: Callable[[int, int], bool] | None) -> None:
        running = [True] * len(self._rows)
        for _ in range(self._request.max_tokens):
            self._cache.begin(self._tokens_BT.shape[1])
            logits_BV = next_logits(self._tokens_BT, self._positions_BT, self._cache)
            chosen_B = self._choose(logits_BV)
            ids = chosen_B.tolist()
            self._note(logits_BV, chosen_B, running)
            for at, (row, new) in enumerate(zip(self._rows, ids, strict=True)):
                if running[at]:
                    running[at] = self._goes_on(row, new, ends)
            if not any(running):
                break
            self._tokens_BT, self._positions_BT = chosen_B[:, None], self._positions_BT[:, -1:] + 1
            if sum(running) <= _ENDED * len(running):
                self._leave_out([at for at, runs in enumerate(running) if runs])
                running = [True] * len(self._rows)

    def _goes_on(self, row: _Row, new: int, ends: Callable[[int, int], bool] | None) -> bool:
        row.made.ids.append(new)
        # Asked in any case, so that it hears of every token.
        ended = ends is not None and ends(row.number, new)
        if ended or new in self._request.stop_ids:
            row.made.reason = EndReason.stop
        elif len(row.made.ids) == self._request.max_tokens:
            row.made.reason = EndReason.length
        elif len(row.prompt) + len(row.made.ids) == self._context:
            row.made.reason = EndReason.context
        else:
            return True
        return False

    def _leave_out(self, kept: list[int]) -> None:
        """Goes on with these rows alone."""
        rows = torch.tensor(kept, device=self._device)
        self._rows = [self._rows[at] for at in kept]
        self._cache.keep(rows)
        self._tokens_BT, self._positions_BT = self._tokens_BT[rows], self._positions_BT[rows]
        if self._occurred_BV is not None:
            self._occurred_BV = self._occurred_BV[rows]

    def _choose(self, logits_BV: Tensor) -> Tensor:
        sampling = self._request.sampling
        if sampling.repetition_penalty != 1.0:
            logits_BV = penalised(logits_BV, self._occurred(logits_BV.shape[1]), sampling.repetition_penalty)
        if sampling.temperature == 0:
            chosen_B = logits_BV.argmax(-1)
        else:
            uniforms_B = torch.tensor([row.random.random() for row in self._rows], dtype=torch.float64)
            chosen_B = draw(filtered(logits_BV, sampling), uniforms_B)
        if self._occurred_BV is not None:
            self._occurred_BV.scatter_(1, chosen_B[:, None], value=True)
        return chosen_B

    def _occurred(self, vocabulary: int) -> Tensor:
        """Which tokens each row has so far, bool `(B, V)`."""
        if self._occurred_BV is None:
            self._occurred_BV = torch.zeros(len(self._rows), vocabulary, dtype=torch.bool, device=self._device)
            for at, row in enumerate(self._rows):
                self._occurred_BV[at, torch.tensor(list(row.prompt), device=self._device)] = True
        return self._occurred_BV

    def _note(self, logits_BV: Tensor, chosen_B: Tensor, running: list[bool]) -> None:
        """Notes the logarithms of probabilities."""
        if self._request.logprobs is None:
            return
        logprobs_BV = logits_BV.log_softmax(-1)
        own = logprobs_BV.gather(1, chosen_B[:, None])[:, 0].tolist()
        best = logprobs_BV.topk(min(self._request.logprobs, logprobs_BV.shape[1]), dim=-1)
        values, ids = best.values.tolist(), best.indices.tolist()
        for at, row in enumerate(self._rows):
            if running[at]:
                row.made.logprobs.append(own[at])
                row.made.alternatives.append(list(zip(ids[at], values[at], strict=True)))
