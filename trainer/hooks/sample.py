"""Samples of the model's text, while it trains and at the end of the run."""

import logging
from collections.abc import Sequence
from typing import final

from regrow.errors import ConfigError
from regrow.models.generation.generate import Request, generate
from regrow.models.generation.sampling import Sampling
from regrow.trainer.hook import Hook
from regrow.trainer.hooks.config import SampleConfig
from regrow.trainer.jsonlines import StepLog
from regrow.trainer.loop import Trainer
from regrow.trainer.next_logits import RunningLogits
from regrow.trainer.run_files import GENERATED, GENERATED_LAST

__all__ = ["SampleHook"]

log = logging.getLogger(__name__)


@final
class SampleHook(Hook):
    """See `SampleConfig`. Written to `generated.txt` and to the log; while training also to `generated.jsonl`."""

    def __init__(self, config: SampleConfig) -> None:
        if config.tokens < 1:
            raise ConfigError(f"hooks.sample.tokens must be at least 1, but is {config.tokens}; use 64")
        if config.every < 0:
            raise ConfigError(
                f"hooks.sample.every must be at least 0, but is {config.every}; use 0 for the end alone"
            )
        if not all(config.prompts):
            raise ConfigError("hooks.sample.prompts must hold texts, but one is empty; write 'The '")
        self._sampling(config, 0).check("hooks.sample.")
        self._config = config
        self._log: StepLog | None = None

    @staticmethod
    def _sampling(config: SampleConfig, seed: int) -> Sampling:
        return Sampling(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, seed=seed)

    def before_fit(self, trainer: Trainer) -> None:
        if self._config.every and trainer.context.is_main:
            self._log = StepLog(trainer.resources.run_dir / GENERATED, trainer.state.step)

    def after_optimizer_step(self, trainer: Trainer) -> None:
        if self._config.every and trainer.state.step % self._config.every == 0:
            texts = self._texts(trainer)
            if self._log is not None:
                self._log.append({"step": trainer.state.step, "texts": texts})
                self._tell(texts)

    def after_fit(self, trainer: Trainer) -> None:
        if trainer.state.step < trainer.options.steps:
            return
        texts = self._texts(trainer)
        if trainer.context.is_main:
            (trainer.resources.run_dir / GENERATED_LAST).write_text("\n\n---\n\n".join(texts) + "\n")
            self._tell(texts)

    def close(self, trainer: Trainer) -> None:
        if self._log is not None:
            self._log.close()

    def _tell(self, texts: Sequence[str]) -> None:
        for text in texts:
            log.info("sample: %s", text)

    def _texts(self, trainer: Trainer) -> list[str]:
        tokenizer, config = trainer.resources.tokenizer, self._config
        prompts = [list(tokenizer.encode(p, add_special_tokens=False).ids) for p in config.prompts]
        request = Request(
            max_tokens=config.tokens, sampling=self._sampling(config, trainer.options.seed), batch_size=1
        )
        logits = RunningLogits(trainer.engine, trainer.options.seq_len)
        longest = max(map(len, prompts), default=0) + config.tokens
        with trainer.evaluating():
            made = generate(logits, prompts, request, context=longest + 1, device=trainer.context.device)
        return [str(tokenizer.decode(p + m.ids)) for p, m in zip(prompts, made, strict=True)]
