"""From a task and what a model makes of it to numbers."""

import math
import re
from collections.abc import Callable, Sequence

from regrow.models.scoring import Score
from regrow.trainer.evaluation.encode import Row, Texts
from regrow.trainer.evaluation.task import Cloze, Generation, Item, MultipleChoice, Perplexity, Task

__all__ = ["Generate", "Measured", "ScoreAll", "measure", "metrics_of"]

# Results by name.
Measured = dict[str, float]
ScoreAll = Callable[[Sequence[Row]], Sequence[Score]]
# From prompts, and the item of each, to what is written after them.
Generate = Callable[[Sequence[str], Sequence[Generation]], Sequence[str]]

_METRICS: dict[type[Item], tuple[str, ...]] = {
    MultipleChoice: ("acc", "acc_norm"),
    Cloze: ("acc", "ppl"),
    Perplexity: ("ppl", "bits_per_byte"),
    Generation: ("exact_match",),
}


def measure(
    task: Task, texts: Texts, score: ScoreAll, generate: Generate, *, shots: int = 0, seed: int = 0
) -> Measured:
    """The metrics of a task: `acc` and `acc_norm` (likelihood per character) of choices, `acc` and `ppl` of clozes,
    `ppl` (per token) and `bits_per_byte` of texts, `exact_match` of what is generated.

    Args:
        task: what is asked.
        texts: encodes for the model.
        score: of rows.
        generate: writes after prompts.
        shots: examples before each item.
        seed: of their choice.

    Raises:
        TaskError: an item cannot be asked of this model.
    """
    before = task.queries(shots, seed)
    first = task.items[0]
    if isinstance(first, MultipleChoice):
        return _choices(task, before, texts, score)
    if isinstance(first, Cloze):
        return _clozes(task, before, texts, score)
    if isinstance(first, Perplexity):
        return _perplexity(task, texts, score)
    return _generation(task, before, generate)


def metrics_of(task: Task) -> tuple[str, ...]:
    """The names of a task's metrics."""
    return _METRICS[type(task.items[0])]


def _where(task: Task, place: int) -> str:
    return f"item {place + 1} of {task.source}"


def _choices(task: Task, before: Sequence[str], texts: Texts, score: ScoreAll) -> Measured:
    rows: list[Row] = []
    items = [item for item in task.items if isinstance(item, MultipleChoice)]
    for place, item in enumerate(items):
        rows += [texts.pair(before[place] + item.query, choice, _where(task, place)) for choice in item.choices]
    scores = iter(score(rows))
    right = right_by_length = 0
    for item in items:
        logprobs = [next(scores).logprob for _ in item.choices]
        right += _best(logprobs) == item.gold
        right_by_length += _best([p / n for p, n in zip(logprobs, item.lengths, strict=True)]) == item.gold
    return {"acc": right / len(items), "acc_norm": right_by_length / len(items), "items": len(items)}


def _best(values: Sequence[float]) -> int:
    """The first of the largest."""
    return max(range(len(values)), key=lambda n: values[n])


def _clozes(task: Task, before: Sequence[str], texts: Texts, score: ScoreAll) -> Measured:
    items = [item for item in task.items if isinstance(item, Cloze)]
    rows = [
        texts.pair(before[place] + item.context, item.target, _where(task, place)) for place, item in enumerate(items)
    ]
    scores = score(rows)
    mean = sum(s.logprob for s in scores) / len(scores)
    return {"acc": sum(s.is_greedy for s in scores) / len(scores), "ppl": _exp(-mean), "items": len(items)}


def _perplexity(task: Task, texts: Texts, score: ScoreAll) -> Measured:
    items = [item for item in task.items if isinstance(item, Perplexity)]
    rows = [row for item in items for row in texts.windows(item.text)]
    total = math.fsum(s.logprob for s in score(rows))
    tokens, size = sum(asked for _, asked in rows), sum(len(item.text.encode()) for item in items)
    return {"ppl": _exp(-total / tokens), "bits_per_byte": -total / size / math.log(2), "items": len(items)}


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _generation(task: Task, before: Sequence[str], generate: Generate) -> Measured:
    items = [item for item in task.items if isinstance(item, Generation)]
    written = generate([b + item.query for b, item in zip(before, items, strict=True)], items)
    right = sum(_answered(text, item) for text, item in zip(written, items, strict=True))
    return {"exact_match": right / len(items), "items": len(items)}


def _answered(text: str, item: Generation) -> bool:
    if item.regex is not None:
        found = re.search(item.regex, text)
        if found is None:
            return False
        text = found.group(1) if found.re.groups else found.group()
    return (text or "").strip() in {answer.strip() for answer in item.answers}
