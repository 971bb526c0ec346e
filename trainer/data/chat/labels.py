"""Conversations as token ids, and which of them are labels.

The assistant's turns are found in one of two ways.

- By the template's `{% generation %}` marks, as transformers' `return_assistant_tokens_mask` does it.
- Otherwise by rendering the beginning of the conversation: turn i is what stands between the text of the messages
  before it with the generation prompt, and the text of the messages up to it. The one must begin with the other, and
  the text of the whole conversation with both; then, and only then, the turn is what the model would have been asked
  to write at this place of this text. Templates that render history otherwise (Qwen3 leaves out earlier reasoning)
  fail the check for earlier turns. Those are context without labels, and the caller is told; where no turn is left,
  the conversation is refused. The turn ends with its end-of-turn token: where only white space follows the last
  special token of the text between, that is the template's, not the model's.

In both ways a token counts that shares a character with a turn.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from regrow.trainer.data.chat.conversation import Conversation
from regrow.trainer.data.chat.template import ChatTemplate, Rendered
from regrow.trainer.data.config import LabelMode
from regrow.trainer.data.source import DataError
from regrow.trainer.data.tokenizer import tokenizer_errors

__all__ = ["REWRITTEN_TURN", "encode_conversation"]

Int64s = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Span = tuple[int, int]

REWRITTEN_TURN = "assistant's turn that the template renders otherwise within its conversation, left without labels"


class _Turns(NamedTuple):
    """The characters of the turns that were asked for.

    Attributes:
        spans: [start, stop) in order, apart from one another.
        unsound: why a turn has no place of its own in the text, for each that has none.
    """

    spans: list[Span]
    unsound: list[str]


def encode_conversation(
    conversation: Conversation,
    template: ChatTemplate,
    tokenizer: Tokenizer,
    mode: LabelMode,
    note: Callable[[str], None] | None = None,
) -> tuple[Int64s, Bools]:
    """The tokens of a conversation, as `apply_chat_template` gives them.

    Args:
        conversation: messages, tools and variables.
        template: renders it.
        tokenizer: without truncation and padding (see `load_tokenizer`).
        mode: which tokens are labels; a conversation without a turn of the assistant may have none.
        note: told what was left out, once for each.

    Returns:
        The ids, and for each whether it counts as a label (for the position before it), both `(tokens,)`.

    Raises:
        DataError: the template does not take the conversation, or no turn of the assistant can be told from the rest.
    """
    whole = template.render(conversation)
    with tokenizer_errors("data.tokenizer must encode what its chat template makes, but does not"):
        encoding = tokenizer.encode(whole.text, add_special_tokens=False)
    ids = np.array(encoding.ids, dtype=np.int64)
    if mode is LabelMode.all:
        return ids, np.ones(len(ids), dtype=np.bool_)
    wanted = _wanted(conversation, mode)
    every_turn = wanted == [i for i, m in enumerate(conversation.messages) if m["role"] == "assistant"]
    if whole.spans is not None and every_turn:
        turns = _Turns(whole.spans, [])
    elif whole.spans is not None:
        turns = _marked_turns(conversation, template, whole, wanted)
    else:
        turns = _written_turns(conversation, template, whole, wanted, _ends(tokenizer, template))
    if wanted and not turns.spans and turns.unsound:
        raise DataError(
            "the chat template must show which tokens are the assistant's, but renders none of its turns the same "
            f"alone and within the conversation ({turns.unsound[-1]}); use a template with {{% generation %}} marks, "
            "or data.labels=all"
        )
    if note is not None:
        for _ in turns.unsound:
            note(REWRITTEN_TURN)
    offsets = np.fromiter(chain.from_iterable(encoding.offsets), dtype=np.int64, count=2 * len(ids)).reshape(-1, 2)
    return ids, _overlapping(offsets, turns.spans)


def _wanted(conversation: Conversation, mode: LabelMode) -> list[int]:
    """The assistant's turns that are to have labels, as indices of messages."""
    turns = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    if mode is LabelMode.last:
        turns = turns[-1:]
    return [i for i in turns if i not in conversation.uncounted]


@lru_cache(maxsize=2)
def _special_tokens(tokenizer: Tokenizer) -> frozenset[str]:
    """Kept, as the library makes objects of thousands of added tokens each time."""
    return frozenset(token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special)


def _ends(tokenizer: Tokenizer, template: ChatTemplate) -> tuple[str, ...]:
    """The special tokens, with which a turn may end."""
    return tuple(_special_tokens(tokenizer) | {template.special_tokens.get("eos_token", "")} - {""})


def _written_turns(
    conversation: Conversation, template: ChatTemplate, whole: Rendered, wanted: Sequence[int], ends: tuple[str, ...]
) -> _Turns:
    """The turns of a template without marks."""
    turns = _Turns([], [])
    for i in wanted:
        try:
            before = _beginning(conversation, template, whole, i, add_generation_prompt=True)
            after = _beginning(conversation, template, whole, i + 1)
        except DataError as error:
            turns.unsound.append(str(error).partition("; ")[0])
            continue
        if len(before) > len(after):
            turns.unsound.append(f"the prompt for message {i} is longer than what it becomes")
            continue
        turn = after[len(before) :]
        if turn.rstrip().endswith(ends):
            turn = turn.rstrip()
        if turn:
            turns.spans.append((len(before), len(before) + len(turn)))
    return turns


def _marked_turns(
    conversation: Conversation, template: ChatTemplate, whole: Rendered, wanted: Sequence[int]
) -> _Turns:
    """The marks within some of the turns."""
    turns = _Turns([], [])
    for i in wanted:
        try:
            start = len(_beginning(conversation, template, whole, i)) if i else 0
            stop = len(_beginning(conversation, template, whole, i + 1))
        except DataError as error:
            turns.unsound.append(str(error).partition("; ")[0])
            continue
        turns.spans.extend(span for span in whole.spans or () if start <= span[0] and span[1] <= stop)
    return turns


def _beginning(
    conversation: Conversation,
    template: ChatTemplate,
    whole: Rendered,
    count: int,
    *,
    add_generation_prompt: bool = False,
) -> str:
    """The text of the first messages, which the text of the whole conversation begins with.

    Raises:
        DataError: it does not, or the template does not take the first messages alone.
    """
    messages = conversation.messages[:count]
    if count == len(conversation.messages) and not add_generation_prompt:
        return whole.text
    text = template.render(conversation, messages, add_generation_prompt=add_generation_prompt).text
    if not whole.text.startswith(text):
        what = "prompt after" if add_generation_prompt else "text of"
        raise DataError(f"the {what} the first {count} messages is not how the whole conversation begins")
    return text


def _overlapping(offsets: Int64s, spans: Sequence[Span]) -> Bools:
    """Which tokens share a character with a span.

    Args:
        offsets: the characters [start, stop) of each token, `(tokens, 2)`.
        spans: in order, apart from one another.
    """
    if not spans or not len(offsets):
        return np.zeros(len(offsets), dtype=np.bool_)
    starts, stops = np.array(spans, dtype=np.int64).T
    # As transformers goes through them: the first span that ends after the token begins, never going back.
    nearest = np.searchsorted(stops, np.maximum.accumulate(offsets[:, 0]), side="right")
    found = nearest < len(spans)
    counts: Bools = found & (offsets[:, 1] > starts[np.minimum(nearest, len(spans) - 1)])
    return counts
