"""From texts to the tokens that are asked for, as lm-evaluation-harness joins and cuts them."""

from collections.abc import Iterator

from tokenizers import Tokenizer

from regrow.trainer.evaluation.task import TaskError

__all__ = ["Row", "Texts"]

# Token ids, and how many of the last are asked for.
Row = tuple[list[int], int]


class Texts:
    """Encodes texts for a model.

    Args:
        tokenizer: the model's.
        first: the token that stands before a text that nothing comes before.
        context: the longest sequence that the model takes.

    Attributes:
        cut: pairs whose beginning was left out because they are longer than that.
    """

    def __init__(self, tokenizer: Tokenizer, first: int, context: int) -> None:
        self._tokenizer, self._first, self._context = tokenizer, first, context
        self.cut = 0

    def ids(self, text: str) -> list[int]:
        """A text's tokens, without special ones of the tokenizer's own."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def pair(self, before: str, after: str, where: str) -> Row:
        """What `after` is asked for as, behind `before`.

        Args:
            before: may be empty.
            after: not empty.
            where: it stands, for messages.

        Raises:
            TaskError: `after` is longer than the model takes.
        """
        # Spaces belong to the word behind them, as tokenizers have it.
        spaces = len(before) - len(before.rstrip())
        if spaces:
            before, after = before[:-spaces], before[-spaces:] + after
        begun = self.ids(before) if before else []
        whole = self.ids(before + after)
        asked = len(whole) - len(begun)
        if asked < 1:
            raise TaskError(
                f"what is asked for must add a token to what comes before, but {where} adds none; mend it"
            )
        if asked > self._context:
            raise TaskError(
                f"what is asked for must be at most as long as the longest sequence that the model takes "
                f"({self._context} tokens), but {where} has {asked}; shorten it"
            )
        ids = whole if begun else [self._first, *whole]
        if len(ids) > self._context + 1:
            self.cut += 1
        return ids[-(self._context + 1) :], asked

    def windows(self, text: str) -> Iterator[Row]:
        """A whole text in stretches of the longest sequence, each token asked for once.

        The last stretch begins earlier, so that it is as long as the others.
        """
        ids, size = [self._first, *self.ids(text)], self._context
        done = 1
        while done < len(ids):
            end = min(len(ids), done + size)
            yield ids[max(0, end - size - 1) : end], end - done
            done = end
