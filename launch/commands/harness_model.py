"""A model of ours as lm-evaluation-harness asks for one: published tasks, where their data is at hand.

    from regrow.launch.commands.harness_model import HarnessModel
    lm_eval.simple_evaluate(HarnessModel.open("outputs/first"), tasks=["hellaswag"])

`regrow-eval CKPT --harness hellaswag` does this. It needs the extra `eval`.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from typing_extensions import override

from regrow.errors import ConfigError
from regrow.launch.commands.evaluate_model import print_results, write_after
from regrow.launch.commands.loaded_model import LoadedModel, open_on
from regrow.launch.commands.texts import chat_template_of, ending_ids
from regrow.models.scoring import Score, score_rows
from regrow.trainer.data.chat.conversation import Conversation
from regrow.trainer.evaluation.encode import Row, Texts
from regrow.trainer.evaluation.task import Generation

__all__ = ["HarnessModel", "run"]


@final
class HarnessModel(LM):  # type: ignore[misc, unused-ignore]
    """See lm_eval's `LM`; answers can be cached by its `use_cache`.

    Args:
        loaded: the model, whole.
        batch_size: rows that are computed together.
        context: tokens that are looked back at most; None: as many as the model takes.
        max_tokens: of a generated text, where a task says nothing.
    """

    def __init__(
        self, loaded: LoadedModel, *, batch_size: int = 16, context: int | None = None, max_tokens: int = 256
    ) -> None:
        super().__init__()
        self._loaded, self._batch_size, self._max_tokens = loaded, batch_size, max_tokens
        longest = context or loaded.model.config.max_seq_len
        self._texts = Texts(loaded.tokenizer, min(ending_ids(loaded), default=0), longest)
        self._device = next(loaded.model.parameters()).device

    @classmethod
    def open(
        cls, place: str, *, device: str = "auto", dtype: str | None = None, tokenizer: str | None = None, **more: Any
    ) -> "HarnessModel":
        """Of any checkpoint; see `open_on`."""
        return cls(open_on(place, device=device, dtype=dtype, tokenizer=tokenizer), **more)

    @property
    def tokenizer_name(self) -> str:
        """Under which lm_eval caches requests with a chat template."""
        folder = self._loaded.tokenizer_folder
        return "regrow" if folder is None else str(folder).replace("/", "__")

    @override
    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template's text, of which lm_eval keeps the hash."""
        return chat_template_of(self._loaded).identity()

    @override
    def apply_chat_template(self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """A conversation as text."""
        conversation = Conversation(messages=chat_history)
        template = chat_template_of(self._loaded)
        return template.render(conversation, add_generation_prompt=add_generation_prompt).text

    @override
    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The logarithm of each continuation's probability, and whether it is what greedy decoding would write."""
        pairs = [request.args for request in requests]
        rows = [self._texts.pair(before, after, f"request {n}") for n, (before, after) in enumerate(pairs, 1)]
        answers = [(score.logprob, score.is_greedy) for score in self._score(rows)]
        self._cache("loglikelihood", pairs, answers)
        return answers

    @override
    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The logarithm of each whole text's probability."""
        windows = [list(self._texts.windows(request.args[0])) for request in requests]
        scores = iter(self._score([row for rows in windows for row in rows]))
        answers = [sum(next(scores).logprob for _ in rows) for rows in windows]
        self._cache("loglikelihood_rolling", [request.args for request in requests], answers)
        return answers

    @override
    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What is written after each text, its likeliest tokens."""
        pairs = [request.args for request in requests]
        items = [self._item(text, options) for text, options in pairs]
        answers = list(write_after(self._loaded, [item.query for item in items], items, self._batch_size))
        self._cache("generate_until", pairs, answers)
        return answers

    def _item(self, text: str, options: dict[str, Any]) -> Generation:
        if options.get("do_sample") and options.get("temperature", 1.0) > 0:
            raise ConfigError(
                "a task must be generated greedily (do_sample: false), but one asks to draw; use --harness with "
                "tasks that do not"
            )
        until = options.get("until") or []
        stop = (until,) if isinstance(until, str) else tuple(until)
        most = options.get("max_gen_toks", options.get("max_new_tokens", options.get("max_tokens", self._max_tokens)))
        return Generation(query=text, answers=("",), stop=stop, max_tokens=int(most))

    @torch.inference_mode()
    def _score(self, rows: Sequence[Row]) -> list[Score]:
        return score_rows(self._loaded.model, rows, self._batch_size)

    def _cache(self, kind: str, asked: Sequence[Any], answers: Sequence[Any]) -> None:
        for arguments, answer in zip(asked, answers, strict=True):
            self.cache_hook.add_partial(kind, arguments, answer)


def run(args: argparse.Namespace) -> None:
    """Prints the metrics of each checkpoint, by task.

    Args:
        args: of `regrow-eval`.

    Raises:
        ConfigError: there is no such task, or a checkpoint cannot be used.
    """
    include = args.harness_tasks
    if include is not None and not Path(include).is_dir():
        raise ConfigError(f"--harness-tasks must be a folder of tasks, but {include} is none; check it")
    # lm_eval's own thousands of tasks take ten seconds to list.
    manager = TaskManager(include_path=include, include_defaults=False) if include is not None else None
    if manager is None or set(args.harness) - set(manager.all_tasks):
        manager = TaskManager(include_path=include)
    unknown = sorted(set(args.harness) - set(manager.all_tasks))
    if unknown:
        raise ConfigError(
            f"--harness must name tasks of lm_eval, but {unknown[0]} is none; see `lm_eval ls tasks`, or name a "
            "folder with it by --harness-tasks"
        )
    found = {}
    for place in args.checkpoints:
        loaded = open_on(place, device=args.device, dtype=args.dtype, tokenizer=args.tokenizer)
        model = HarnessModel(loaded, batch_size=args.batch_size, context=args.context)
        results = simple_evaluate(
            model, tasks=list(args.harness), task_manager=manager, num_fewshot=args.few_shot or None,
            limit=args.limit, bootstrap_iters=0, fewshot_random_seed=args.seed, log_samples=False,
        )  # fmt: skip
        assert results is not None, "this process has the results"
        found[place] = {name: _numbers(metrics) for name, metrics in results["results"].items()}
    print_results(found, as_json=args.json)


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Without names and errors, filters as lm_eval writes them: `acc,none` is `acc`."""
    plain = json.loads(json.dumps(metrics, default=str))
    return {
        name.removesuffix(",none"): float(value)
        for name, value in plain.items()
        if isinstance(value, int | float) and "_stderr" not in name
    }
