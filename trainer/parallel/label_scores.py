"""How likely labels are, and whether each is the likeliest: what evaluation asks of a model under any layout.

Shapes: B batch, T positions, D model width, S = B·T rows, R some of them, V vocabulary, or this rank's part of it,
N ranks that share it.
"""

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor, nn

from regrow.trainer.data.windows import IGNORE
from regrow.trainer.parallel.collectives import all_gather_no_grad
from regrow.trainer.parallel.output_loss import chunk_rows, output_operands
from regrow.trainer.parallel.vocabulary import VocabularyShard

__all__ = ["LabelScores"]


@final
class LabelScores:
    """Called by a model in place of its output layer, as `ChunkedLoss` is; without gradients.

    Args:
        labels_BT: int64, over the whole vocabulary; `IGNORE` is not asked for.
        shard: this rank's part of the vocabulary, None where that is whole.
        told: hears of each row the natural logarithm of its label's probability and whether another token is
            likelier, float64 `(S, 2)`; zeros where the label is not asked for.
    """

    def __init__(self, labels_BT: Tensor, shard: VocabularyShard | None, told: Callable[[Tensor], object]) -> None:
        self._labels_S, self._shard, self._told = labels_BT.flatten(), shard, told

    def __call__(self, hidden_BTD: Tensor, output: nn.Module) -> Tensor:
        """The sum of the logarithms, a float64 scalar."""
        operands = output_operands(output, hidden_BTD)
        if operands is None:
            return self.of(output(hidden_BTD))
        hidden_SD, weight_VD = operands[0].flatten(0, -2), operands[1].to(hidden_BTD.dtype)
        largest = len(weight_VD) if self._shard is None else self._shard.largest
        size = chunk_rows(len(hidden_SD), largest, hidden_SD.device.type)
        parts = [
            self._scores(hidden_SD[start : start + size] @ weight_VD.t(), self._labels_S[start : start + size])
            for start in range(0, len(hidden_SD), size)
        ]
        return self._tell(torch.cat(parts))

    def of(self, logits_BTV: Tensor) -> Tensor:
        """The same of a model that gives its logits."""
        return self._tell(self._scores(logits_BTV.flatten(0, -2), self._labels_S))

    def _tell(self, scores_S2: Tensor) -> Tensor:
        self._told(scores_S2)
        return scores_S2[:, 0].sum()

    def _scores(self, logits_RV: Tensor, labels_R: Tensor) -> Tensor:
        logits_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
        asked_R = labels_R != IGNORE
        labels_R = labels_R.where(asked_R, 0)
        if self._shard is None:
            own_R = logits_RV.gather(1, labels_R[:, None])[:, 0]
            logprobs_R, best_R = own_R - logits_RV.logsumexp(-1), logits_RV.argmax(-1)
        else:
            logprobs_R, best_R = _shared(logits_RV, labels_R, self._shard)
        found_R2 = torch.stack([logprobs_R.to(torch.float64), (best_R != labels_R).to(torch.float64)], dim=1)
        return found_R2.where(asked_R[:, None], 0.0)


def _shared(logits_RV: Tensor, labels_R: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    """The labels' log-probabilities and the likeliest tokens, the first of equals; a collective."""
    own_R4 = logits_RV.new_zeros(len(logits_RV), 4, dtype=torch.float64)
    # A part of no tokens has none that is likely.
    own_R4[:, 0] = -torch.inf
    if shard.count:
        highest_R, at_R = logits_RV.max(-1)
        here_R = shard.holds(labels_R)
        targets_R1 = logits_RV.gather(1, (labels_R - shard.first).where(here_R, 0)[:, None])
        own_R4[:, 0], own_R4[:, 1] = highest_R, at_R + shard.first
        own_R4[:, 2] = (logits_RV - highest_R[:, None]).exp().sum(-1)
        own_R4[:, 3] = targets_R1[:, 0].where(here_R, 0.0)
    every_NR4 = all_gather_no_grad(own_R4, shard.group).view(-1, *own_R4.shape)
    top_R, rank_R = every_NR4[..., 0].max(0)
    sums_R = (every_NR4[..., 2] * (every_NR4[..., 0] - top_R).exp()).sum(0)
    best_R = every_NR4[..., 1].gather(0, rank_R[None])[0]
    return every_NR4[..., 3].sum(0) - sums_R.log() - top_R, best_R.to(torch.int64)
