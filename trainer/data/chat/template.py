"""Chat templates: found in a tokenizer's folder and rendered as transformers' `apply_chat_template` does it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Final

from jinja2 import Template

from regrow.trainer.data.chat.bounds import Rendering, rendering
from regrow.trainer.data.chat.conversation import Conversation, Json, Message
from regrow.trainer.data.chat.generation_marks import Marked, marks_of, recording
from regrow.trainer.data.chat.sandbox import ChatEnvironment
from regrow.trainer.data.source import DataError, digest, shown

__all__ = ["ChatTemplate", "Rendered"]

_ENVIRONMENT: Final = ChatEnvironment()
# As transformers 5 orders them: the first that a message has is what templates get under the first and second names.
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_DEFAULT = "default"
_WITH_TOOLS = "tool_use"


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text.

    Attributes:
        text: what is tokenised.
        spans: the characters that the template marks as the assistant's, [start, stop) in order; None where it has no
            marks, or has them where their place cannot be known.
    """

    text: str
    spans: list[tuple[int, int]] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatTemplate:
    """The templates of a tokenizer, and what they get beside a conversation.

    Attributes:
        texts: the templates by name; a single one is `default`.
        name: the one to use; None is `tool_use` for a conversation with tools, where there is one, else `default`.
        special_tokens: `bos_token`, `eos_token` and so on, by these names.
        date: what `strftime_now` tells; None refuses templates that ask for it.
    """

    texts: dict[str, str]
    name: str | None = None
    special_tokens: dict[str, str] = field(default_factory=dict)
    date: datetime | None = None

    def identity(self) -> str:
        """A short name for everything that decides the text of a conversation."""
        date = None if self.date is None else self.date.isoformat()
        return digest(json.dumps([self.texts, self.name, self.special_tokens, date], sort_keys=True))

    def check(self) -> None:
        """Compiles the templates that may be used.

        Raises:
            DataError: there is none of that name, or one is no template.
        """
        names = [self.name] if self.name is not None else [n for n in (_DEFAULT, _WITH_TOOLS) if n in self.texts]
        for name in names or [_DEFAULT]:
            _compiled(self._text(name))

    def render(
        self,
        conversation: Conversation,
        messages: Sequence[Message] | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> Rendered:
        """Renders a conversation.

        Args:
            conversation: with its tools and variables.
            messages: instead of the conversation's own; the first ones of these.
            add_generation_prompt: end with what precedes an assistant's turn.

        Raises:
            DataError: the template does not take it, with the template's own message; or it asks for a date and
                none is set.
        """
        name = self.name
        if name is None:
            name = _WITH_TOOLS if conversation.tools is not None and _WITH_TOOLS in self.texts else _DEFAULT
        source = self._text(name)
        template, has_marks = _compiled(source)
        variables: dict[str, object] = {
            **self.special_tokens,
            **conversation.variables,
            "messages": _as_templates_get(conversation.messages if messages is None else messages),
            "tools": conversation.tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        marked = Marked()
        text = _run(template, variables, marked, Rendering(self.date, len(source)))
        return Rendered(text=text, spans=marked.spans(text) if has_marks else None)

    def _text(self, name: str) -> str:
        try:
            return self.texts[name]
        except KeyError:
            raise DataError(
                f"data.template must name a chat template of data.tokenizer ({', '.join(map(shown, self.texts))}), "
                f"but is {shown(name)}; choose one of these"
            ) from None


def _as_templates_get(messages: Sequence[Message]) -> list[Message]:
    """Messages without nulls, and with the reasoning under both of the names that templates look for."""
    given: list[Message] = []
    for message in messages:
        kept: Message = {name: message[name] for name in message if message[name] is not None}
        reasoning: Json = next((kept[name] for name in _REASONING_FIELDS if name in kept), None)
        if reasoning is not None:
            kept = {"thinking": reasoning, **kept, "reasoning_content": reasoning}
        given.append(kept)
    return given


@lru_cache(maxsize=64)
def _compiled(source: str) -> tuple[Template, bool | None]:
    """A template, and whether it has marks (see `marks_of`)."""
    try:
        return _ENVIRONMENT.from_string(_ENVIRONMENT.charging(source)), marks_of(_ENVIRONMENT, source)
    except MemoryError:
        raise
    except Exception as error:  # jinja2's own, and Python's on the code made of it
        raise DataError(
            f"data.tokenizer must have a sound chat template, but it cannot be compiled ({_reason(error)}); mend it"
        ) from None


def _run(template: Template, variables: dict[str, object], marked: Marked, state: Rendering) -> str:
    blocks: list[str] = []
    try:
        with recording(marked), rendering(state):
            for block in template.generate(variables):
                blocks.append(block)
                marked.length += len(block)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # a template calls methods of texts, lists and numbers, which raise what they like
        raise DataError(
            f"the chat template does not take the conversation ({_reason(error)}); mend or remove it, or use another "
            "template"
        ) from None
    return "".join(blocks)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it calls itself too often"
    return shown(" ".join(str(error).split())) or type(error).__name__
