"""Scores are those of a row by itself, from all of its logits."""

import pytest
import torch

from regrow.models.scoring import score_rows
from tests.unit.models.test_key_value_cache import model_of


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@torch.no_grad()
def test_scores_are_those_of_all_logits(batch_size: int) -> None:
    model, _ = model_of()
    generator = torch.Generator().manual_seed(4)
    rows = []
    for length, asked in ((2, 1), (30, 29), (9, 3), (17, 1), (30, 2), (5, 4)):
        rows.append((torch.randint(0, 320, (length,), generator=generator).tolist(), asked))
    # One whose end is what the model would write.
    greedy = rows[2][0][:6]
    for _ in range(3):
        greedy = [*greedy, int(model(torch.tensor([greedy]))[0, -1].argmax())]
    rows.append((greedy, 3))
    scores = score_rows(model, rows, batch_size)
    for (ids, asked), score in zip(rows, scores, strict=True):
        logits = model(torch.tensor([ids[:-1]]))[0, -asked:]
        targets = torch.tensor(ids[-asked:])
        logprobs = logits.log_softmax(-1).gather(1, targets[:, None])
        assert score.logprob == pytest.approx(float(logprobs.sum()), rel=1e-12)
        assert score.is_greedy == bool((logits.argmax(-1) == targets).all())
    assert scores[-1].is_greedy
    assert not scores[1].is_greedy
