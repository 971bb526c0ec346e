"""What a model makes of rows and prompts while it trains, under any layout: the same on every rank."""

from collections.abc import Callable, Sequence
from typing import final

import torch
import torch.distributed as dist
from tokenizers import Tokenizer

from regrow.models.generation.generate import Request, generate
from regrow.models.generation.sampling import Sampling
from regrow.models.scoring import Score
from regrow.trainer.data.loader import MicroBatch
from regrow.trainer.data.windows import IGNORE
from regrow.trainer.evaluation.encode import Row
from regrow.trainer.evaluation.task import Generation
from regrow.trainer.next_logits import RunningLogits
from regrow.trainer.parallel.context import ParallelContext
from regrow.trainer.parallel.engine import Engine
from regrow.trainer.text_stream import TextStream

__all__ = ["EvaluationStopped", "RunningModel"]

# Lengths of batches, as parts of the longest: few, since each is compiled for itself.
_PARTS = (16, 4, 1)


class EvaluationStopped(Exception):
    """The ranks have agreed to stop before the evaluation had ended."""


@final
class RunningModel:
    """Asks a model that is trained; every rank calls the same with the same arguments.

    Args:
        engine: runs the model, in eval mode.
        context: this rank's place.
        tokenizer: of the data.
        ends: tokens that end a text.
        rows: of a forward pass.
        longest: the longest sequence, that of training.
        stops: whether the ranks agree to stop, asked after each forward pass.
    """

    def __init__(
        self,
        engine: Engine,
        context: ParallelContext,
        *,
        tokenizer: Tokenizer,
        ends: frozenset[int],
        rows: int,
        longest: int,
        stops: Callable[[], bool],
    ) -> None:
        self._engine, self._context, self._stops = engine, context, stops
        self._tokenizer, self._ends, self._rows, self._longest = tokenizer, ends, rows, longest

    def score(self, rows: Sequence[Row]) -> list[Score]:
        """The scores of rows, which the data ranks share out.

        Raises:
            EvaluationStopped: a rank is to stop.
        """
        context = self._context
        order = sorted(range(len(rows)), key=lambda n: -len(rows[n][0]))
        size = self._rows * context.layout.data_ranks
        sums_N2 = torch.zeros(len(rows), 2, dtype=torch.float64, device=context.device)
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            length = self._length(len(rows[chosen[0]][0]) - 1)
            mine = chosen[context.data_rank * self._rows :][: self._rows]
            found = self._engine.label_scores(_batch([rows[n] for n in mine], self._rows, length))
            sums_N2[mine] = found[: len(mine)]
            if self._stops():
                raise EvaluationStopped
        if context.world_size > 1:
            # Ranks of one batch hold parts of its rows' scores, all others nothing of them.
            dist.all_reduce(sums_N2)
        return [Score(logprob, is_greedy=missed == 0) for logprob, missed in sums_N2.tolist()]

    def _length(self, tokens: int) -> int:
        """The shortest of a few lengths that holds so many tokens and can be split as training's can."""
        layout = self._context.layout
        multiple = 2 * layout.cp * layout.tp if layout.cp * layout.tp > 1 else 1
        for part in _PARTS:
            length = -(-self._longest // part // multiple) * multiple
            if length >= tokens:
                return min(length, self._longest)
        return self._longest

    def write(self, prompts: Sequence[str], items: Sequence[Generation]) -> list[str]:
        """What the model writes after each prompt, its likeliest tokens, one prompt at a time.

        Raises:
            EvaluationStopped: a rank is to stop.
        """
        return [self._continue(prompt, item) for prompt, item in zip(prompts, items, strict=True)]

    def _continue(self, prompt: str, item: Generation) -> str:
        ids = list(self._tokenizer.encode(prompt, add_special_tokens=False).ids) or [min(self._ends, default=0)]
        stream = TextStream(self._tokenizer, ids, item.stop)
        text = ""

        def ends(_number: int, token: int) -> bool:
            nonlocal text
            if self._stops():
                raise EvaluationStopped
            if token not in self._ends:
                text += stream.push(token)
            return stream.stopped

        request = Request(max_tokens=item.max_tokens, sampling=Sampling(temperature=0.0), stop_ids=self._ends)
        logits = RunningLogits(self._engine, self._longest)
        longest = len(ids) + item.max_tokens + 1
        generate(logits, [ids], request, context=longest, device=self._context.device, ends=ends)
        return text + stream.finish()


def _batch(rows: Sequence[Row], size: int, length: int) -> MicroBatch:
    """Rows as a micro-batch of a fixed shape; what is read is all but the last token."""
    tokens_BT = torch.zeros(size, length, dtype=torch.int64)
    labels_BT = torch.full((size, length), IGNORE, dtype=torch.int64)
    for at, (ids, asked) in enumerate(rows):
        row = torch.tensor(list(ids))
        tokens_BT[at, : len(ids) - 1] = row[:-1]
        labels_BT[at, len(ids) - 1 - asked : len(ids) - 1] = row[-asked:]
    return MicroBatch(tokens=tokens_BT, labels=labels_BT, documents=None)
