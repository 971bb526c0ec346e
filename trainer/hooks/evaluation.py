"""What the model makes of tasks while it trains."""

import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, final

from regrow.errors import ConfigError
from regrow.models.scoring import Score
from regrow.trainer.data.source import DataError
from regrow.trainer.data.tokenizer import end_of_text_id, tokenizer_file
from regrow.trainer.evaluation.encode import Row, Texts
from regrow.trainer.evaluation.harness import READERS
from regrow.trainer.evaluation.in_run import EvaluationStopped, RunningModel
from regrow.trainer.evaluation.measure import Measured, measure, metrics_of
from regrow.trainer.evaluation.task import Task, find_tasks
from regrow.trainer.hooks.config import EvaluationConfig
from regrow.trainer.hooks.measuring import MeasuringHook
from regrow.trainer.loop import Trainer

__all__ = ["EvaluationHook"]


@final
class EvaluationHook(MeasuringHook):
    """See `EvaluationConfig`. Its results are the row's `eval/TASK/METRIC`, and `eval_time_s`, which is part of no
    step's time.
    """

    def __init__(self, config: EvaluationConfig) -> None:
        for name, least, remedy in (("every", 0, 1000), ("few_shot", 0, 0)):
            value = getattr(config, name)
            if value < least:
                raise ConfigError(f"hooks.evaluation.{name} must be at least {least}, but is {value}; use {remedy}")
        if not all(at > 0 for at in config.at_tokens):
            raise ConfigError(
                f"hooks.evaluation.at_tokens must be above 0, but is {config.at_tokens}; use [1000000000]"
            )
        if not config.tasks:
            raise ConfigError("hooks.evaluation.tasks must name files of tasks, but names none; see docs/evaluate.md")
        self._config = config
        self._tasks = find_tasks(config.tasks, READERS, option="hooks.evaluation.tasks")
        for task in self._tasks:
            task.queries(config.few_shot, config.seed, option="hooks.evaluation.few_shot")

    def before_fit(self, trainer: Trainer) -> None:
        # Encodes everything, so that what the model does not take is told before it trains.
        shots, seed, texts = self._config.few_shot, self._config.seed, self._texts(trainer)
        for task in self._tasks:
            measure(task, texts, _no_scores, lambda prompts, _items: [""] * len(prompts), shots=shots, seed=seed)
        super().before_fit(trainer)

    def due(self, trainer: Trainer) -> bool:
        state, options = trainer.state, trainer.options
        every = self._config.every
        before = state.tokens - options.global_batch_size * options.seq_len
        reached = any(before < at <= state.tokens for at in self._config.at_tokens)
        return bool(every and state.step % every == 0) or reached or state.step == options.steps

    def names(self, trainer: Trainer) -> Collection[str]:
        return [f"eval/{task.name}/{metric}" for task in self._tasks for metric in metrics_of(task)]

    def measure(self, trainer: Trainer) -> dict[str, float] | None:
        started = time.perf_counter()
        model, texts = self._model(trainer), self._texts(trainer)
        found: dict[str, float] = {}
        try:
            with trainer.evaluating():
                for task in self._tasks:
                    found |= _named(task, self._ask(task, texts, model))
        except EvaluationStopped:
            return None
        return found | {"eval_time_s": time.perf_counter() - started}

    def _ask(self, task: Task, texts: Texts, model: RunningModel) -> Measured:
        shots, seed = self._config.few_shot, self._config.seed
        return measure(task, texts, model.score, model.write, shots=shots, seed=seed)

    def _model(self, trainer: Trainer) -> RunningModel:
        return RunningModel(
            trainer.engine,
            trainer.context,
            tokenizer=trainer.resources.tokenizer,
            ends=_ends(trainer),
            rows=trainer.resources.micro_batch_size,
            longest=trainer.options.seq_len,
            stops=lambda: trainer.agree_on_stop() is not None,
        )

    def _texts(self, trainer: Trainer) -> Texts:
        return Texts(trainer.resources.tokenizer, min(_ends(trainer), default=0), trainer.options.seq_len)


def _no_scores(rows: Sequence[Row]) -> list[Score]:
    return [Score(0.0, is_greedy=False)] * len(rows)


def _named(task: Task, measured: Measured) -> dict[str, float]:
    return {f"eval/{task.name}/{metric}": measured[metric] for metric in metrics_of(task)}


def _ends(trainer: Trainer) -> frozenset[int]:
    """The token that ends a text, where the tokenizer has one."""
    data: dict[str, Any] = trainer.resources.config["data"]
    eos, given = data.get("eos_token"), data.get("tokenizer")
    with suppress(DataError, OSError):
        file = tokenizer_file(given) if isinstance(given, str) else Path("tokenizer.json")
        return frozenset({end_of_text_id(trainer.resources.tokenizer, file, eos if isinstance(eos, str) else None)})
    return frozenset()
