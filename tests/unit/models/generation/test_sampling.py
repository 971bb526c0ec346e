"""Filters are transformers', and draws follow the probabilities that they leave."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from regrow.errors import ConfigError
from regrow.models.generation.sampling import Sampling, draw, filtered, penalised, row_generator

FILTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.15},
    "all": {"temperature": 1.3, "top_k": 6, "top_p": 0.9, "min_p": 0.05},
}


def theirs(logits: torch.Tensor, ids: torch.Tensor, s: Sampling) -> torch.Tensor:
    """The same by transformers, in its order."""
    made: list[Any] = [TemperatureLogitsWarper(s.temperature)]
    if s.repetition_penalty != 1.0:
        made.insert(0, RepetitionPenaltyLogitsProcessor(s.repetition_penalty))
    made += [TopKLogitsWarper(s.top_k)] if s.top_k else []
    made += [TopPLogitsWarper(s.top_p)] if s.top_p < 1 else []
    made += [MinPLogitsWarper(s.min_p)] if s.min_p else []
    out: torch.Tensor = LogitsProcessorList(made)(ids, logits)
    return out


@given(
    seed=st.integers(0, 2**32),
    temperature=st.floats(0.1, 3.0),
    top_k=st.integers(0, 40),
    top_p=st.floats(0.05, 1.0),
    min_p=st.floats(0.0, 1.0),
    penalty=st.floats(0.5, 2.0),
)
def test_filters_are_theirs(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float, penalty: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(3, 32, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, 32, (3, 5), generator=generator)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty)
    sampling.check()
    occurred = torch.zeros(3, 32, dtype=torch.bool).scatter(1, ids, value=True)
    ours = filtered(penalised(logits, occurred, penalty), sampling)
    expected = theirs(logits.clone(), ids, sampling)
    assert torch.equal(ours.isinf(), expected.isinf())
    torch.testing.assert_close(ours, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", FILTERS)
def test_draws_follow_what_a_filter_leaves(name: str) -> None:
    """By Pearson's chi-square; its limit by Wilson and Hilferty (1931), passed by chance once in 20,000 times."""
    draws = 40_000
    logits = 1.5 * torch.randn(1, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    allowed = filtered(logits, Sampling(**FILTERS[name]))
    random = row_generator(11, [1, 2, 3], 0)
    uniforms = torch.tensor([random.random() for _ in range(draws)], dtype=torch.float64)
    counts = draw(allowed.expand(draws, -1), uniforms).bincount(minlength=12).double()
    expected = draws * allowed[0].softmax(-1)
    kept = expected > 0
    assert not counts[~kept].any()
    statistic = float(((counts - expected)[kept] ** 2 / expected[kept]).sum())
    freedom = int(kept.sum()) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 3.9 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < limit


def test_the_ends_of_a_draw() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]]).expand(3, -1)
    uniforms = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, uniforms).tolist() == [1, 3, 3]


def test_random_numbers_are_of_seed_prompt_and_repeat() -> None:
    ways = [(0, [1, 2], 0), (1, [1, 2], 0), (-1, [1, 2], 0), (0, [2, 1], 0), (0, [1, 2], 1), (0, [0, 1, 2], 0)]
    first = [row_generator(*way).random() for way in ways]
    assert len(set(first)) == len(ways)
    assert first == [row_generator(*way).random() for way in ways]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"temperature": -1.0}, "--temperature must be at least 0, but is -1; use 0.7"),
        ({"temperature": math.nan}, "--temperature must be at least 0, but is nan"),
        ({"top_k": -1}, "--top_k must be at least 0, but is -1; use 0 for no limit"),
        ({"top_p": 0.0}, "--top_p must be above 0 and at most 1, but is 0; use 1 for no limit"),
        ({"top_p": 1.5}, "--top_p must be above 0 and at most 1, but is 1.5"),
        ({"min_p": 2.0}, "--min_p must be from 0 to 1, but is 2"),
        ({"repetition_penalty": 0.0}, "--repetition_penalty must be above 0, but is 0; use 1 for none"),
    ],
)
def test_what_cannot_be_is_said(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Sampling(**fields).check("--")
    assert str(refused.value).startswith(sentence)
