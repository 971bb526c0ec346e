"""What `regrow-generate` does once its arguments are read: loads a model and speaks with it."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, TextIO, final

from regrow.errors import ConfigError
from regrow.launch.commands.command_ranks import CommandRanks
from regrow.launch.commands.loaded_model import open_on
from regrow.launch.commands.texts import Texts, chat_template_of
from regrow.models.generation.generate import Completion, Request
from regrow.models.generation.sampling import Sampling
from regrow.trainer.data.chat.conversation import conversation_of

__all__ = ["run"]


def run(args: argparse.Namespace, prompts: Sequence[str], ranks: CommandRanks) -> None:
    """Completes the prompts, or talks where there are none; prints what comes.

    Args:
        args: of the command.
        prompts: texts, or turns of a user with `--chat`.
        ranks: of the command.

    Raises:
        ConfigError: an option, a prompt or the checkpoint cannot be.
    """
    request = _request(args)
    request.check("--")
    if not prompts and args.ranks not in (None, args.tp):
        raise ConfigError(f"--ranks must be --tp ({args.tp}) in a talk, but is {args.ranks}; leave it out")
    speaker = _Speaker(args, request, ranks)
    if not prompts:
        speaker.talk(sys.stdin)
        return
    ids = [speaker.turn([{"role": "user", "content": p}]) if args.chat else speaker.encode(p) for p in prompts]
    one = len(prompts) == 1 and not args.json
    made = speaker.complete(ids, _print if one and ranks.speaks else None)
    if not ranks.speaks:
        return
    if args.json:
        print(json.dumps([_as_json(p, text, c) for p, (text, c) in zip(prompts, made, strict=True)]))
    elif one:
        print()
    else:
        for prompt, (text, _) in zip(prompts, made, strict=True):
            print(f"=== {prompt}\n{text}\n")


def _print(text: str) -> None:
    print(text, end="", flush=True)


def _request(args: argparse.Namespace) -> Request:
    sampling = Sampling(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
    )
    return Request(max_tokens=args.max_tokens, sampling=sampling, logprobs=args.logprobs, batch_size=args.batch_size)


def _as_json(prompt: str, text: str, made: Completion) -> dict[str, Any]:
    found: dict[str, Any] = {"prompt": prompt, "text": text, "ids": made.ids, "reason": made.reason.value}
    if made.logprobs:
        found["logprobs"] = made.logprobs
        found["alternatives"] = [[{"id": i, "logprob": p} for i, p in place] for place in made.alternatives]
    return found


@final
class _Speaker:
    """A model that is spoken with.

    Args:
        args: of the command.
        request: what is wanted of each prompt, but for what ends it.
        ranks: of the command.
    """

    def __init__(self, args: argparse.Namespace, request: Request, ranks: CommandRanks) -> None:
        self._args, self._ranks = args, ranks
        loaded = open_on(args.checkpoint, device=args.device, dtype=args.dtype, tokenizer=args.tokenizer, ranks=ranks)
        self._template = chat_template_of(loaded) if args.chat else None
        self._texts = Texts(loaded, request, stop=args.stop, special=False)

    def encode(self, text: str) -> list[int]:
        """A prompt's ids."""
        return self._texts.encode(text)

    def turn(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The ids of a conversation, up to where the assistant's turn begins."""
        assert self._template is not None
        system = [{"role": "system", "content": self._args.system}] if self._args.system is not None else []
        conversation = conversation_of({"messages": [*system, *messages]})
        return self._texts.encode(self._template.render(conversation, add_generation_prompt=True).text)

    def complete(
        self, prompts: list[list[int]], told: Callable[[str], object] | None = None
    ) -> list[tuple[str, Completion]]:
        """Each prompt's text and completion; with one prompt, `told` hears the text as it is made."""
        if len(prompts) == 1:
            return self._texts.complete(prompts, told)
        made: list[Any] = self._ranks.share_out(prompts, lambda mine: self._texts.complete(list(mine)))
        return made

    def talk(self, lines: TextIO) -> None:
        """A conversation, a line of the user's a turn."""
        messages: list[dict[str, str]] = []
        asks, speaks = sys.stdin.isatty(), self._ranks.speaks
        while True:
            if asks and speaks:
                _print("> ")
            line = self._ranks.told(lines.readline)
            if not line:
                return
            if not line.strip():
                continue
            messages.append({"role": "user", "content": line.strip()})
            ((text, _),) = self.complete([self.turn(messages)], _print if speaks else None)
            if speaks:
                print(flush=True)
            messages.append({"role": "assistant", "content": text})
