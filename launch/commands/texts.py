"""Text from a model: prompts as text, what ends one, text while it is made."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import final

import torch

from regrow.launch.commands.loaded_model import TOKENIZER, LoadedModel
from regrow.models.generation.generate import Completion, Request, check_prompts, generate, next_logits_of
from regrow.trainer.data.chat.template import ChatTemplate
from regrow.trainer.data.chat.template_files import read_chat_template
from regrow.trainer.data.source import DataError
from regrow.trainer.data.tokenizer import end_of_text_id
from regrow.trainer.text_stream import TextStream

__all__ = ["Texts", "chat_template_of", "ending_ids"]

_GENERATION = "generation_config.json"


def ending_ids(loaded: LoadedModel) -> frozenset[int]:
    """The tokens that end a text: of `generation_config.json`, and the end of text that the tokenizer has."""
    found: set[int] = set()
    folder = loaded.tokenizer_folder
    if folder is not None and (folder / _GENERATION).is_file():
        try:
            ids = json.loads((folder / _GENERATION).read_text()).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            ids = None
        found |= {i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)}
    eos = loaded.data.get("eos_token")
    # A tokenizer need not have one; texts then end where they have the most tokens.
    with suppress(DataError):
        file = (folder or Path()) / TOKENIZER
        found.add(end_of_text_id(loaded.tokenizer, file, eos if isinstance(eos, str) else None))
    return frozenset(found)


def chat_template_of(loaded: LoadedModel) -> ChatTemplate:
    """The chat template beside the tokenizer, or beside the one that the model's run was given.

    Raises:
        DataError: there is none.
    """
    name, date = loaded.data.get("template"), loaded.data.get("template_date")
    given = loaded.data.get("tokenizer")
    places = [loaded.tokenizer_folder, *([Path(given)] if isinstance(given, str) else [])]
    folders = [p if p.is_dir() else p.parent for p in places if p is not None and p.exists()]
    for last, folder in reversed(list(enumerate(reversed(folders)))):
        try:
            return read_chat_template(folder, name=name, date=date)
        except DataError:
            if last == 0:
                raise
    raise DataError(
        "the tokenizer must lie in a folder with a chat template, but none is known; give --tokenizer DIR"
    )


@final
class Texts:
    """Continues texts.

    Args:
        loaded: the model.
        request: what is wanted of each prompt; tokens that end a text are added to its own.
        stop: texts that end one, and are no part of it.
        special: whether special tokens are shown.
    """

    def __init__(
        self, loaded: LoadedModel, request: Request, *, stop: Sequence[str] = (), special: bool = False
    ) -> None:
        self._loaded, self._stop, self._special = loaded, stop, special
        self._request = dataclasses.replace(request, stop_ids=request.stop_ids | ending_ids(loaded))
        self._logits = next_logits_of(loaded.model)

    def encode(self, text: str) -> list[int]:
        """A text's ids, special tokens in it as such, and no others."""
        return list(self._loaded.tokenizer.encode(text, add_special_tokens=False).ids)

    @torch.inference_mode()
    def complete(
        self, prompts: list[list[int]], told: Callable[[str], object] | None = None
    ) -> list[tuple[str, Completion]]:
        """Each prompt's new text, and its ids with those that end it.

        Args:
            prompts: ids.
            told: hears the text as it is made, of one prompt alone.

        Raises:
            ConfigError: a prompt cannot be.
        """
        model = self._loaded.model
        check_prompts(prompts, model.config.vocab_size, model.config.max_seq_len)
        streams = [TextStream(self._loaded.tokenizer, p, self._stop, special=self._special) for p in prompts]
        texts = [""] * len(prompts)

        def add(number: int, text: str) -> None:
            texts[number] += text
            if told is not None and len(prompts) == 1 and text:
                told(text)

        def ends(number: int, token: int) -> bool:
            if token not in self._request.stop_ids or self._special:
                add(number, streams[number].push(token))
            return streams[number].stopped

        device = next(model.parameters()).device
        context = model.config.max_seq_len
        made = generate(self._logits, prompts, self._request, context=context, device=device, ends=ends)
        for number, stream in enumerate(streams):
            add(number, stream.finish())
        return list(zip(texts, made, strict=True))
