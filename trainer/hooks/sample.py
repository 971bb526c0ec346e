"""A sample of the model's text at the end of the run."""

import logging
from typing import final

from tokenizers import Tokenizer

from regrow.errors import ConfigError
from regrow.trainer.generate import generate
from regrow.trainer.hook import Hook
from regrow.trainer.hooks.config import SampleConfig
from regrow.trainer.loop import Trainer

__all__ = ["SampleHook"]

log = logging.getLogger(__name__)


@final
class SampleHook(Hook):
    """See `SampleConfig`. Written to `generated.txt` and to the log."""

    def __init__(self, config: SampleConfig) -> None:
        if config.tokens < 1:
            raise ConfigError(f"hooks.sample.tokens must be at least 1, but is {config.tokens}; use 64")
        if not all(config.prompts):
            raise ConfigError("hooks.sample.prompts must hold texts, but one is empty; write 'The '")
        if config.temperature < 0:
            raise ConfigError(f"hooks.sample.temperature must be at least 0, but is {config.temperature}; use 0.7")
        self._config = config

    def after_fit(self, trainer: Trainer) -> None:
        if trainer.state.step < trainer.options.steps:
            return
        tokenizer = trainer.resources.tokenizer
        with trainer.evaluating():
            texts = [self._continue(trainer, tokenizer, i, p) for i, p in enumerate(self._config.prompts)]
        if trainer.context.is_main:
            (trainer.resources.run_dir / "generated.txt").write_text("\n\n---\n\n".join(texts) + "\n")
            for text in texts:
                log.info("sample: %s", text)

    def _continue(self, trainer: Trainer, tokenizer: Tokenizer, index: int, prompt: str) -> str:
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids
        new = generate(
            trainer.engine.last_logits,
            ids,
            tokens=self._config.tokens,
            context=trainer.options.seq_len,
            temperature=self._config.temperature,
            seed=trainer.options.seed + index,
            device=trainer.context.device,
        )
        return str(tokenizer.decode(ids + new))
