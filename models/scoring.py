"""How likely tokens are after those before them: of many rows together, without their logits as a whole.

Shapes: B rows, T positions, D model width, V vocabulary, M positions that are asked for, R of these at a time.
"""

import inspect
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Score", "score_rows"]

# Logits that are there at a time.
_ELEMENTS = 1 << 24


class Score(NamedTuple):
    """Of the last tokens of a row.

    Attributes:
        logprob: the sum of the natural logarithms of their probabilities.
        is_greedy: whether each is the likeliest at its place.
    """

    logprob: float
    is_greedy: bool


def score_rows(model: nn.Module, rows: Sequence[tuple[Sequence[int], int]], batch_size: int) -> list[Score]:
    """Scores the end of each row, under `no_grad` or `inference_mode`.

    Args:
        model: a `LanguageModel` in eval mode, whole.
        rows: token ids, at least two each, and how many of the last are asked for.
        batch_size: rows that are computed together.
    """
    order = sorted(range(len(rows)), key=lambda n: -len(rows[n][0]))
    scores: list[Score] = [Score(0.0, is_greedy=True)] * len(rows)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        found = _score_batch(model, [rows[n] for n in chosen])
        for number, score in zip(chosen, found, strict=True):
            scores[number] = score
    return scores


def _score_batch(model: nn.Module, rows: Sequence[tuple[Sequence[int], int]]) -> list[Score]:
    device = next(model.parameters()).device
    # What is read: all but the last token. What comes behind a row changes nothing before it.
    length = max(len(ids) for ids, _ in rows) - 1
    tokens_BT = torch.zeros(len(rows), length, dtype=torch.int64)
    asked_BT = torch.zeros(len(rows), length, dtype=torch.bool)
    targets: list[int] = []
    for at, (ids, count) in enumerate(rows):
        tokens_BT[at, : len(ids) - 1] = torch.tensor(list(ids[:-1]))
        asked_BT[at, len(ids) - 1 - count : len(ids) - 1] = True
        targets += ids[-count:]
    asked_BT, targets_M = asked_BT.to(device), torch.tensor(targets, device=device)

    def score(hidden_BTD: Tensor, output: nn.Module) -> Tensor:
        return _scores_of(hidden_BTD[asked_BT], targets_M, output)

    if "output_loss" in inspect.signature(model.forward).parameters:
        found_M2: Tensor = model(tokens_BT.to(device), output_loss=score)
    else:
        found_M2 = _scores_of(model(tokens_BT.to(device))[asked_BT], targets_M, nn.Identity())
    scores, start = [], 0
    values = found_M2.tolist()
    for _, count in rows:
        part = values[start : start + count]
        scores.append(Score(sum(p for p, _ in part), all(hit > 0 for _, hit in part)))
        start += count
    return scores


def _scores_of(hidden_MD: Tensor, targets_M: Tensor, output: nn.Module) -> Tensor:
    """The logarithm of each target's probability, and whether it is the likeliest, float64 `(M, 2)`."""
    width = getattr(output, "out_features", hidden_MD.shape[1])
    step = max(1, _ELEMENTS // width)
    found: list[Tensor] = []
    for start in range(0, len(hidden_MD), step):
        logits_RV: Tensor = output(hidden_MD[start : start + step])
        logits_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
        targets_R1 = targets_M[start : start + step, None]
        own_R1 = logits_RV.gather(1, targets_R1)
        logprobs_R1 = own_R1 - logits_RV.logsumexp(-1, keepdim=True)
        hits_R1 = logits_RV.argmax(-1, keepdim=True) == targets_R1
        found.append(torch.cat([logprobs_R1.to(torch.float64), hits_R1.to(torch.float64)], dim=1))
    return torch.cat(found)
