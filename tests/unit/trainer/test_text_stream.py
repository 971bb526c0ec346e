"""Text in pieces is the text as a whole, up to what ends it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from regrow.trainer.data.tokenizer import load_tokenizer, train_bpe
from regrow.trainer.text_stream import TextStream

TEXTS = ["grüße, 你好 and the cat sat on the mat. END", "a 👩‍👩‍👧 line\nof text, and more text"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    file = tmp_path_factory.mktemp("t") / "tokenizer.json"
    train_bpe(TEXTS * 3, 280, file)
    return load_tokenizer(file)


def streamed(tokenizer: Tokenizer, prompt: str, text: str, stop: list[str]) -> tuple[list[str], bool]:
    ids = tokenizer.encode(prompt + text).ids
    begun = len(tokenizer.encode(prompt).ids)
    stream = TextStream(tokenizer, ids[:begun], stop)
    pieces = [stream.push(token) for token in ids[begun:]]
    return [*pieces, stream.finish()], stream.stopped


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30), prompt=st.sampled_from(["", "the cat "]))
def test_pieces_are_the_whole(tokenizer: Tokenizer, text: str, prompt: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    stream = TextStream(tokenizer, tokenizer.encode(prompt).ids)
    assert "".join([*(stream.push(i) for i in ids), stream.finish()]) == tokenizer.decode(ids)


@pytest.mark.parametrize("text", TEXTS)
@given(data=st.data())
def test_it_ends_before_the_first_stop(tokenizer: Tokenizer, text: str, data: st.DataObject) -> None:
    stops = data.draw(st.lists(st.sampled_from([text[5:9], text[7:9], "at. E", "zzz", text[-3:]]), max_size=3))
    pieces, stopped = streamed(tokenizer, "", text, stops)
    places = [at for s in stops if (at := text.find(s)) >= 0]
    assert "".join(pieces) == (text[: min(places)] if places else text)
    assert stopped == bool(places)


def test_a_character_of_several_tokens_comes_whole(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, [])
    ids = tokenizer.encode("𝕏", add_special_tokens=False).ids
    assert len(ids) == 4
    assert [stream.push(i) for i in ids] == ["", "", "", "𝕏"]
