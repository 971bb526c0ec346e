"""Token ids to text while they are made: what is certain, and whether a text that ends it has come."""

from collections.abc import Sequence
from typing import final

from tokenizers import Tokenizer

__all__ = ["TextStream"]

# Tokens before the first new one that a decoder may look at.
_NEIGHBOURS = 8
# What stands for bytes that are no character, or not yet.
_UNFINISHED = "\ufffd"


@final
class TextStream:
    """The text that is added to a prompt.

    Args:
        tokenizer: whose decoder makes text of ids.
        prompt: what came before, because decoders look at neighbours.
        stop: texts that end it and are no part of it.
        special: whether special tokens are shown.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = (), *, special: bool = False
    ):
        self._tokenizer, self._stop, self._special = tokenizer, [s for s in stop if s], special
        self._ids = list(prompt[-_NEIGHBOURS:])
        # Text is made of the ids from `_before` on; that of those before `_read` has been given already.
        self._before, self._read = 0, len(self._ids)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that has become certain with this token; nothing after a text that ends it."""
        if self.stopped:
            return ""
        self._ids.append(token)
        return self._certain(self._new())

    def finish(self) -> str:
        """What was held back, because more could have followed."""
        if self.stopped:
            return ""
        known, whole = self._decoded(self._before, self._read), self._decoded(self._before, len(self._ids))
        self._before = self._read = len(self._ids)
        text, self._held = self._held + whole[len(known) :], ""
        return self._cut(text)

    def _new(self) -> str:
        known, whole = self._decoded(self._before, self._read), self._decoded(self._before, len(self._ids))
        if whole.endswith(_UNFINISHED) or len(whole) <= len(known):
            return ""
        self._before, self._read = self._read, len(self._ids)
        return whole[len(known) :]

    def _decoded(self, start: int, stop: int) -> str:
        return str(self._tokenizer.decode(self._ids[start:stop], skip_special_tokens=not self._special))

    def _certain(self, new: str) -> str:
        text = self._cut(self._held + new)
        if self.stopped:
            return text
        # The longest end that one of the texts may begin with is held back.
        hold = max((n for s in self._stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def _cut(self, text: str) -> str:
        places = [at for s in self._stop if (at := text.find(s)) >= 0]
        if not places:
            return text
        self.stopped, self._held = True, ""
        return text[: min(places)]
