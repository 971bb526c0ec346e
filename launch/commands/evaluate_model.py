"""What `regrow-eval` does once its tasks are read: loads each model and asks it."""

import argparse
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from regrow.checkpoint.errors import CheckpointError
from regrow.checkpoint.format.later_metrics import add_later_metrics
from regrow.checkpoint.format.step_name import parse_step_name
from regrow.checkpoint.format.stored_step import StoredStep
from regrow.checkpoint.load.initial_load import pin_source
from regrow.checkpoint.storage.base import Storage
from regrow.checkpoint.storage.local import LocalStorage
from regrow.checkpoint.storage.opening import as_storage
from regrow.errors import ConfigError
from regrow.launch.commands.command_ranks import ALONE, CommandRanks
from regrow.launch.commands.identify_model import run_folder_of
from regrow.launch.commands.loaded_model import LoadedModel, open_on
from regrow.launch.commands.texts import Texts as Speaker
from regrow.launch.commands.texts import ending_ids
from regrow.launch.run.stored_run import steps_place, stored_config, stored_steps
from regrow.models.generation.generate import Request
from regrow.models.generation.sampling import Sampling
from regrow.models.scoring import Score, score_rows
from regrow.trainer.data.tokenizer import vocabulary_size
from regrow.trainer.evaluation.encode import Row, Texts
from regrow.trainer.evaluation.measure import Measured, measure, metrics_of
from regrow.trainer.evaluation.record import EVALUATIONS, EvaluationKey, EvaluationRecord, fingerprint
from regrow.trainer.evaluation.task import Generation, Task
from regrow.trainer.run_files import CONFIG

__all__ = ["evaluate", "follow", "print_results", "run", "step_evaluator", "write_after"]

log = logging.getLogger(__name__)


def run(args: argparse.Namespace, tasks: Sequence[Task], ranks: CommandRanks) -> None:
    """Prints the metrics of each checkpoint.

    Args:
        args: of the command.
        tasks: what is asked.
        ranks: of the command.

    Raises:
        ConfigError: a checkpoint or a task cannot be used.
    """
    found = {place: _results_of(place, args, tasks, ranks) for place in args.checkpoints}
    if ranks.speaks:
        print_results(found, as_json=args.json)


def print_results(found: Mapping[str, Mapping[str, Mapping[str, float]]], *, as_json: bool) -> None:
    """Prints metrics by checkpoint and task; of one checkpoint without its name.

    Args:
        found: metrics.
        as_json: as one JSON value, else a line for each task.
    """
    if as_json:
        print(json.dumps(found if len(found) > 1 else next(iter(found.values()))))
        return
    for place, of_tasks in found.items():
        for name, metrics in of_tasks.items():
            shown = "  ".join(f"{metric} {value:.6g}" for metric, value in metrics.items())
            print(f"{f'{place}  ' if len(found) > 1 else ''}{name}  {shown}")


def step_evaluator(
    run_dir: Path, args: argparse.Namespace, tasks: Sequence[Task], ranks: CommandRanks = ALONE
) -> Callable[[Storage], None]:
    """What evaluates a step of a run and prints a line of JSON, on the first rank.

    Args:
        run_dir: the run's directory.
        args: of the command.
        tasks: what is asked.
        ranks: of the command; the others follow.
    """

    def evaluate_step(step: Storage) -> None:
        ranks.told(lambda: step.url)
        print(_line(step, _results_of(str(run_dir), args, tasks, ranks, step)), flush=True)

    return evaluate_step


def follow(run_dir: Path, args: argparse.Namespace, tasks: Sequence[Task], ranks: CommandRanks) -> None:
    """Takes part in what the first rank evaluates, until it tells of no further step; see `step_evaluator`."""
    steps = stored_steps(run_dir, stored_config(run_dir))
    while True:
        url: str | None = ranks.told(lambda: None)
        if url is None:
            return
        try:
            _results_of(str(run_dir), args, tasks, ranks, steps.child(url.rpartition("/")[2]))
        except CheckpointError:
            # The first rank meets it too, and says so.
            continue


def _line(step: Storage, found: dict[str, Measured]) -> str:
    return json.dumps({"step": parse_step_name(step.url.rpartition("/")[2]), **found})


def _results_of(
    place: str, args: argparse.Namespace, tasks: Sequence[Task], ranks: CommandRanks, step: Storage | None = None
) -> dict[str, Measured]:
    """The metrics of a checkpoint by task, those of a run's step from its record as far as it has them.

    Args:
        place: the checkpoint.
        args: of the command.
        tasks: what is asked.
        ranks: of the command.
        step: of the run at `place`, instead of the newest.
    """
    given = as_storage(place if "://" in place else Path(place).expanduser())
    base = steps_place(given)
    step = step or ranks.same_place(base, lambda: pin_source(base))
    recorded = _Recorded.of(given, step, args)
    found = ranks.told(lambda: {t.name: known for t in tasks if (known := recorded.find(t)) is not None})
    missing = [task for task in tasks if task.name not in found]
    if missing:
        loaded = open_on(
            place,
            device=args.device,
            dtype=args.dtype,
            tokenizer=args.tokenizer,
            step=step,
            ranks=ranks,
        )
        for task in missing:
            found |= evaluate(
                loaded,
                [task],
                shots=args.few_shot,
                seed=args.seed,
                batch_size=args.batch_size,
                context=args.context,
                ranks=ranks,
            )
            if ranks.speaks:
                recorded.add(task, found[task.name])
    return {task.name: found[task.name] for task in tasks}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Recorded:
    """The record of the run that a step is of; of other checkpoints nothing is kept.

    Attributes:
        record: None where there is no run.
        step: the step.
        args: of the command.
    """

    record: EvaluationRecord | None
    step: StoredStep | None
    args: argparse.Namespace

    @classmethod
    def of(cls, given: Storage, stored: Storage, args: argparse.Namespace) -> "_Recorded":
        """Of the step or folder `stored`, which lies in the run `given` or is it."""
        run = run_folder_of(stored)
        if isinstance(given, LocalStorage) and (given.path / CONFIG).is_file():
            run = given.path
        record = None if run is None else EvaluationRecord(run / EVALUATIONS)
        return cls(record=record, step=StoredStep.find(stored), args=args)

    def _key(self, step: StoredStep, task: Task) -> EvaluationKey:
        args = self.args
        return EvaluationKey(
            step=step.step,
            lineage=step.manifest.lineage,
            task=task.name,
            items=fingerprint(task),
            few_shot=args.few_shot,
            seed=args.seed,
            context=args.context,
            dtype=args.dtype,
        )

    def find(self, task: Task) -> Measured | None:
        """What was found before; None where it was not."""
        if self.record is None or self.step is None:
            return None
        return self.record.find(self._key(self.step, task))

    def add(self, task: Task, measured: Measured) -> None:
        """Keeps what was found: in the run's record, and with the step for rules of retention."""
        if self.record is None or self.step is None:
            return
        try:
            self.record.add(self._key(self.step, task), measured)
            named = {f"eval/{task.name}/{metric}": measured[metric] for metric in metrics_of(task)}
            add_later_metrics(self.step.storage, named)
        except OSError as error:
            log.warning("what was found is not kept with the run (%s)", error.strerror or error)


@torch.inference_mode()
def evaluate(
    loaded: LoadedModel,
    tasks: Sequence[Task],
    *,
    shots: int = 0,
    seed: int = 0,
    batch_size: int = 16,
    context: int | None = None,
    ranks: CommandRanks = ALONE,
) -> dict[str, Measured]:
    """The metrics of a model, by task.

    Args:
        loaded: the model.
        tasks: what is asked.
        shots: examples before each item.
        seed: of their choice.
        batch_size: rows that are computed together.
        context: tokens that are looked back at most; None: as many as the model takes.
        ranks: which share the items out, or hold the model together.

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
        # Neighbours are of about the same length, so that the ranks have alike to do.
        order = sorted(range(len(rows)), key=lambda n: -len(rows[n][0]))
        found = ranks.share_out([rows[n] for n in order], lambda mine: score_rows(model, mine, batch_size))
        scores: dict[int, Any] = dict(zip(order, found, strict=True))
        return [scores[n] for n in range(len(rows))]

    def generate(prompts: Sequence[str], items: Sequence[Generation]) -> Sequence[str]:
        def write(mine: Sequence[tuple[str, Generation]]) -> Sequence[str]:
            return write_after(loaded, [text for text, _ in mine], [item for _, item in mine], batch_size)

        written: list[Any] = ranks.share_out(list(zip(prompts, items, strict=True)), write)
        return written

    results = {task.name: measure(task, texts, score, generate, shots=shots, seed=seed) for task in tasks}
    if texts.cut:
        log.warning("%d items are longer than the model takes, and began later", texts.cut)
    return results


def write_after(
    loaded: LoadedModel, prompts: Sequence[str], items: Sequence[Generation], batch_size: int
) -> Sequence[str]:
    """What the model writes after each prompt, its likeliest tokens; those with the same rules together.

    Args:
        loaded: the model, whole.
        prompts: the texts.
        items: whose rules say where what is written ends.
        batch_size: rows that are computed together.
    """
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
