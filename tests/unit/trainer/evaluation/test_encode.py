"""Texts are joined and cut as lm-evaluation-harness does it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from regrow.trainer.data.tokenizer import load_tokenizer, train_bpe
from regrow.trainer.evaluation.encode import Texts
from regrow.trainer.evaluation.task import TaskError

TEXT = "the cat sat on the mat and the dog sat on the log, all day long"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    file = tmp_path_factory.mktemp("e") / "tokenizer.json"
    train_bpe([TEXT] * 5, 300, file)
    return load_tokenizer(file)


@given(before=st.text("the cat", max_size=12), after=st.text("abc on", min_size=1, max_size=9))
def test_a_pair_is_the_whole_and_what_is_asked_for(tokenizer: Tokenizer, before: str, after: str) -> None:
    texts = Texts(tokenizer, 7, 1000)
    spaces = len(before) - len(before.rstrip())
    head, tail = (before[:-spaces], before[-spaces:] + after) if spaces else (before, after)
    whole = tokenizer.encode(head + tail).ids
    begun = tokenizer.encode(head).ids if head else []
    if len(whole) == len(begun):
        with pytest.raises(TaskError, match="must add a token"):
            texts.pair(before, after, "item 1")
        return
    ids, asked = texts.pair(before, after, "item 1")
    assert ids == (whole if begun else [7, *whole])
    assert asked == len(whole) - len(begun)


def test_long_pairs_lose_their_beginning(tokenizer: Tokenizer) -> None:
    texts = Texts(tokenizer, 7, 10)
    ids, asked = texts.pair(TEXT, " and the cat", "item 1")
    whole = tokenizer.encode(TEXT + " and the cat").ids
    assert (ids, asked, texts.cut) == (whole[-11:], len(whole) - len(tokenizer.encode(TEXT).ids), 1)
    with pytest.raises(
        TaskError, match=r"at most as long as the longest sequence .*\(10 tokens\), but item 2 has \d+"
    ):
        texts.pair("a", TEXT, "item 2")


def rolling(tokens: list[int], prefix: int, size: int) -> list[tuple[list[int], list[int]]]:
    """`get_rolling_token_windows` and `make_disjoint_window` of the harness, with a context of one token."""
    found = [([prefix, *tokens[: size - 1]][: len(tokens[:size])], tokens[:size])]
    done = len(found[0][1])
    while done < len(tokens):
        count = min(len(tokens) - done, size)
        end = done + count
        found.append((tokens[end - size - 1 : end - 1], tokens[end - count : end]))
        done = end
    return found


@given(words=st.integers(0, 60), size=st.integers(2, 12))
def test_windows_are_the_harness(tokenizer: Tokenizer, words: int, size: int) -> None:
    text = TEXT[:words]
    tokens = tokenizer.encode(text).ids
    rows = list(Texts(tokenizer, 7, size).windows(text))
    if not tokens:
        assert rows == []
        return
    assert [(ids[:-1], ids[-asked:]) for ids, asked in rows] == rolling(tokens, 7, size)
    assert [i for ids, asked in rows for i in ids[-asked:]] == tokens
