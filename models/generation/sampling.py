"""From logits to the next token: filters, and draws that depend on nothing but the row's own numbers.

Filters act as in transformers, in its order: repetition penalty, temperature, top-k, top-p, min-p.

Shapes: B rows, V vocabulary.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from regrow.errors import ConfigError

__all__ = ["Sampling", "draw", "filtered", "penalised", "row_generator"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: the likeliest tokens that may be drawn, and those as likely as the last of them; 0 is no limit.
        top_p: the least part of the probability that the tokens have that may be drawn, likeliest first (Holtzman et
            al. 2020, arXiv:1904.09751); 1 is no limit.
        min_p: the least probability of a token that may be drawn, as a part of the likeliest one's (Nguyen et al.
            2024, arXiv:2407.01082).
        repetition_penalty: divides positive logits of tokens that occurred, in the prompt too, and multiplies
            negative ones (Keskar et al. 2019, arXiv:1909.05858); 1 is none.
        seed: of the draws.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def check(self, prefix: str = "") -> None:
        """Checks the fields.

        Args:
            prefix: stands before a field's name in a message.

        Raises:
            ConfigError: naming field, rule, value and remedy.
        """
        rules = (
            ("temperature", 0.0 <= self.temperature < float("inf"), "at least 0", "0.7"),
            ("top_k", self.top_k >= 0, "at least 0", "0 for no limit"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1", "1 for no limit"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "from 0 to 1", "0 for no limit"),
            ("repetition_penalty", 0.0 < self.repetition_penalty < float("inf"), "above 0", "1 for none"),
        )
        for name, holds, rule, remedy in rules:
            if not holds:
                raise ConfigError(f"{prefix}{name} must be {rule}, but is {getattr(self, name):g}; use {remedy}")


def row_generator(seed: int, prompt: Sequence[int], repeat: int) -> np.random.Generator:
    """The random numbers of one row: of its prompt and not of the rows beside it.

    Args:
        seed: of all rows.
        prompt: token ids.
        repeat: how often the same prompt stands before this one.
    """
    body = np.array([repeat, *prompt], dtype="<i8").tobytes()
    key = hashlib.blake2b(body, digest_size=16, key=seed.to_bytes(16, "little", signed=True)).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


def penalised(logits_BV: Tensor, occurred_BV: Tensor, penalty: float) -> Tensor:
    """The logits, those of tokens that occurred made smaller.

    Args:
        logits_BV: of the next token.
        occurred_BV: bool, which tokens did.
        penalty: above 1.
    """
    smaller_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return torch.where(occurred_BV, smaller_BV, logits_BV)


def filtered(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Logits divided by the temperature, minus infinity where a token may not be drawn.

    Args:
        logits_BV: of the next token, float32 or better.
        sampling: with a temperature above 0.
    """
    logits_BV = logits_BV / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[1]:
        least_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    if sampling.top_p < 1.0:
        ascending_BV, order_BV = logits_BV.sort(dim=-1)
        below_BV = ascending_BV.softmax(-1).cumsum(-1) <= 1.0 - sampling.top_p
        # The likeliest always may.
        below_BV[:, -1] = False
        logits_BV = logits_BV.masked_fill(below_BV.scatter(1, order_BV, below_BV), -torch.inf)
    if sampling.min_p > 0.0:
        probabilities_BV = logits_BV.softmax(-1)
        least_B1 = sampling.min_p * probabilities_BV.amax(-1, keepdim=True)
        logits_BV = logits_BV.masked_fill(probabilities_BV < least_B1, -torch.inf)
    return logits_BV


def draw(logits_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """Draws a token of each row, int64 `(B,)`.

    Args:
        logits_BV: minus infinity where a token may not be drawn.
        uniforms_B: float64, from 0 to below 1.
    """
    totals_BV = logits_BV.to(torch.float64).softmax(-1).cumsum(-1)
    # The last total is 1 but for rounding; a token without probability adds nothing and is stepped over.
    places_B1 = uniforms_B[:, None].to(totals_BV.device) * totals_BV[:, -1:]
    return torch.searchsorted(totals_BV, places_B1, right=True)[:, 0].clamp(max=logits_BV.shape[1] - 1)
