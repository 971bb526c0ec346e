"""What `regrow-eval` does once its tasks are read: loads each model and asks it."""

import argparse
import json
import logging
from collections.abc import Sequence

import torch

from regrow.errors import ConfigError
from regrow.launch.commands.loaded_model import LoadedModel, open_on
from regrow.launch.commands.texts import Texts as Speaker
from regrow.launch.commands.texts import ending_ids
from regrow.models.generation.generate import Request
from regrow.models.generation.sampling import Sampling
from regrow.models.scoring import Score, score_rows
from regrow.trainer.data.tokenizer import vocabulary_size
from regrow.trainer.evaluation.encode import Row, Texts
from regrow.trainer.evaluation.measure import Measured, measure
from regrow.trainer.evaluation.task import Generation, Task

__all__ = ["evaluate", "run"]

log = logging.getLogger(__name__)


def run(args: argparse.Namespace, tasks: Sequence[Task]) -> None:
    """Prints the metrics of each checkpoint.

    Args:
        args: of the command.
        tasks: what is asked.

    Raises:
        ConfigError: a checkpoint or a task cannot be used.
    """
    found: dict[str, dict[str, Measured]] = {}
    for place in args.checkpoints:
        loaded = open_on(place, device=args.device, dtype=args.dtype, tokenizer=args.tokenizer)
        found[place] = evaluate(
            loaded, tasks, shots=args.few_shot, seed=args.seed, batch_size=args.batch_size, context=args.context
        )
    if args.json:
        print(json.dumps(found if len(found) > 1 else next(iter(found.values()))))
        return
    for place, of_tasks in found.items():
        for name, metrics in of_tasks.items():
            shown = "  ".join(f"{metric} {value:.6g}" for metric, value in metrics.items())
            print(f"{f'{place}  ' if len(found) > 1 else ''}{name}  {shown}")


@torch.inference_mode()
def evaluate(
    loaded: LoadedModel,
    tasks: Sequence[Task],
    *,
    shots: int = 0,
    seed: int = 0,
    batch_size: int = 16,
    context: int | None = None,
) -> dict[str, Measured]:
    """The metrics of a model, by task.

    Args:
        loaded: the model, whole.
        tasks: what is asked.
        shots: examples before each item.
        seed: of their choice.
        batch_size: rows that are computed together.
        context: tokens that are looked back at most; None: as many as the model takes.

    Raises:
        ConfigError: the tokenizer is not the model's, or an item cannot be asked of it.
    """
    model = loaded.model
    size = vocabulary_size(loaded.tokenizer)
    if size > model.config.vocab_size:
        raise ConfigError(
            f"the tokenizer must be the model's, which knows {model.config.vocab_size} tokens, but has {size}; give "
            "the right one with --tokenizer"
        )
    longest = model.config.max_seq_len
    if context is not None and context > longest:
        raise ConfigError(
            f"--context must be at most what the model takes ({longest}), but is {context}; leave it out"
        )
    texts = Texts(loaded.tokenizer, min(ending_ids(loaded), default=0), context or longest)

    def score(rows: Sequence[Row]) -> Sequence[Score]:
        return score_rows(model, rows, batch_size)

    def generate(prompts: Sequence[str], items: Sequence[Generation]) -> Sequence[str]:
        return _written(loaded, prompts, items, batch_size)

    results = {task.name: measure(task, texts, score, generate, shots=shots, seed=seed) for task in tasks}
    if texts.cut:
        log.warning("%d items are longer than the model takes, and began later", texts.cut)
    return results


def _written(
    loaded: LoadedModel, prompts: Sequence[str], items: Sequence[Generation], batch_size: int
) -> Sequence[str]:
    """What the model writes after each prompt, its likeliest tokens; those with the same rules together."""
    rules = {(item.stop, item.max_tokens) for item in items}
    written = [""] * len(prompts)
    for stop, max_tokens in sorted(rules):
        request = Request(max_tokens=max_tokens, sampling=Sampling(temperature=0.0), batch_size=batch_size)
        speaker = Speaker(loaded, request, stop=stop)
        places = [n for n, item in enumerate(items) if (item.stop, item.max_tokens) == (stop, max_tokens)]
        for place, (text, _) in zip(
            places, speaker.complete([speaker.encode(prompts[n]) for n in places]), strict=True
        ):
            written[place] = text
    return written
