"""The comparison with transformers compares the same model, and sums up rightly."""

import dataclasses
from pathlib import Path

import pytest

from benchmarks.side_by_side import Comparison, Round, compare, profile_steps
from tests.support import tiny

ROUND = Round(
    ours_s=2.0,
    theirs_s=3.0,
    ours_cpu_s=1.0,
    theirs_cpu_s=2.0,
    products_s=(1.0, 1.1, 1.0),
    loss=1.0,
    peer_loss=1.0,
)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_peer_trains_the_same_model(corpus: Path, tied: bool) -> None:
    options = [f"model.tied_embeddings={tied}", "data.global_batch_size=8", "optimizer.lr=1e-2"]
    overrides = [*tiny(corpus, *options), "checkpoint=disabled", "hooks=none", "scheduler.warmup_steps=1"]
    rounds = compare(overrides, 4)
    assert len(rounds) == 4
    assert all(r.loss == pytest.approx(r.peer_loss, rel=1e-5) for r in rounds)
    assert rounds[-1].loss < rounds[0].loss


@pytest.mark.slow
def test_profile_names_the_products(corpus: Path) -> None:
    seconds = profile_steps([*tiny(corpus), "checkpoint=disabled", "hooks=none", "precision=bf16"], 1)
    assert "aten::mm" in list(seconds)[:10]


def test_rounds_that_are_not_steady_are_left_out() -> None:
    shaken = dataclasses.replace(ROUND, theirs_s=30.0, products_s=(1.0, 1.0, 1.3))
    comparison = Comparison.of([ROUND, ROUND, ROUND, shaken], tokens=10)
    assert (comparison.rounds, comparison.steady, comparison.ratio.median) == (3, 3, 1.5)
    assert (comparison.tokens_per_s, comparison.products, comparison.cpu_ratio.median) == (5.0, 0.5, 2.0)


def test_all_rounds_count_where_hardly_one_was_steady() -> None:
    shaken = dataclasses.replace(ROUND, theirs_s=4.0, products_s=(1.0, 1.0, 1.3))
    comparison = Comparison.of([ROUND, shaken, shaken], tokens=10)
    assert (comparison.rounds, comparison.steady, comparison.ratio.median) == (3, 1, 2.0)
