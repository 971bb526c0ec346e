"""A model that trains, under any layout, as generation asks for one."""

from typing import final

import torch
from torch import Tensor

from regrow.models.key_value_cache import KeyValueCache
from regrow.trainer.parallel.engine import Engine

__all__ = ["RunningLogits"]


@final
class RunningLogits:
    """`NextLogits` for one row at a time, without kept keys: each token is a forward pass over those before it.

    Every rank calls it with the same tokens, and gets the same logits.

    Args:
        engine: runs the model, in eval mode.
        longest: tokens that are looked back at most, those of a sequence of training.
    """

    def __init__(self, engine: Engine, longest: int) -> None:
        self._engine, self._longest = engine, longest
        self._seen = torch.empty(1, 0, dtype=torch.int64)

    def __call__(self, tokens_BT: Tensor, positions_BT: Tensor, cache: KeyValueCache) -> Tensor:
        """See `NextLogits`; the cache stays empty."""
        assert len(tokens_BT) == 1, "ask with batch_size=1"
        begins = int(positions_BT[0, 0]) == 0
        seen = tokens_BT if begins else torch.cat([self._seen, tokens_BT], dim=1)
        # No more is looked at, however long the text becomes.
        self._seen = seen[:, -self._longest :]
        return self._engine.last_logits(self._seen)[None]
