"""The bytes of an encoding's tokens are those of its text."""

import re
import unicodedata
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from regrow.trainer.data.token_bytes import bytes_of_tokens
from regrow.trainer.data.tokenizer import vocabulary_size

TEXT = [
    "The cat sat on the mat, and it sat well.\n\n  def f(x):\n    return x + 1\n",
    "Grüße — 你好, мир! 👋🏽 naïve",
] * 8
SPECIAL = "<|endoftext|>"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

texts = st.text(
    st.one_of(st.sampled_from(" \n\tetaoins.,ñ你👋▁Ġ"), st.characters(exclude_categories=["Cs"])), max_size=40
).filter(lambda text: SPECIAL not in text and "<think>" not in text)


def byte_level(before: pre_tokenizers.PreTokenizer) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = before, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=[SPECIAL], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def gpt2() -> Tokenizer:
    return byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))


def llama3() -> Tokenizer:
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    return byte_level(
        pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    )


def qwen() -> Tokenizer:
    tokenizer = llama3()
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("é你", normalized=False)])
    return tokenizer


def merged() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary of text with bytes apart, as Llama 2's and Gemma's."""
    pieces = ["▁", "t", "h", "e", "c", "a", "s", "ü", "你", "."]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("c", "a"), ("▁", "▁")]
    tokens = ["<unk>", *BYTES, *pieces, *("".join(pair) for pair in merges)]
    return {token: number for number, token in enumerate(tokens)}, merges


def llama2() -> Tokenizer:
    vocabulary, merges = merged()
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def gemma() -> Tokenizer:
    vocabulary, merges = merged()
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    # Tokens of the vocabulary that are noted as added, too.
    tokenizer.add_tokens([AddedToken("▁▁", normalized=False)])
    return tokenizer


def unigram() -> Tokenizer:
    pieces = [("<unk>", 0.0), *((byte, -20.0) for byte in BYTES)]
    pieces += [("▁", -2.0), ("▁the", -1.0), ("the", -2.0), ("a", -3.0), ("t", -3.0), ("ü", -4.0), ("你", -4.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return tokenizer


def total(tokenizer: Tokenizer, text: str) -> int:
    return int(bytes_of_tokens(tokenizer)[tokenizer.encode(text, add_special_tokens=False).ids].sum())


def without_change(text: str) -> int:
    return len(text.encode())


def with_prefix_space(text: str) -> int:
    """GPT-2's `add_prefix_space` and Metaspace: a space before a text that begins with none."""
    return len(text.encode()) + (bool(text) and not text.startswith(" "))


def with_one_more_space(text: str) -> int:
    """Llama 2's normalizer puts one before any text."""
    return len(text.encode()) + bool(text)


# The made tokenizer, what its sums are, and characters of the text that it does not keep.
FAMILIES: dict[str, tuple[Callable[[], Tokenizer], Callable[[str], int], str]] = {
    "gpt2": (gpt2, without_change, ""),
    "llama3": (llama3, without_change, ""),
    "qwen": (qwen, lambda text: len(unicodedata.normalize("NFC", text).encode()), ""),
    "llama2": (llama2, with_one_more_space, "▁"),
    "gemma": (gemma, without_change, "▁"),
    "unigram": (unigram, with_prefix_space, "▁"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bytes_of_any_text_are_counted_exactly(family: str) -> None:
    make, expected, lost = FAMILIES[family]
    tokenizer = make()
    sizes = bytes_of_tokens(tokenizer)
    assert len(sizes) == vocabulary_size(tokenizer)

    @given(texts)
    @settings(max_examples=150)
    def check(text: str) -> None:
        text = re.sub(f"[{lost}]", "", text) if lost else text
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert sizes[ids].sum() == expected(text)

    check()


def test_a_space_before_the_text_is_counted() -> None:
    tokenizer = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True))
    assert total(tokenizer, "cat") == 4
    assert total(tokenizer, " cat") == 4


def test_special_tokens_are_no_text_and_added_ones_are() -> None:
    tokenizer = qwen()
    sizes = bytes_of_tokens(tokenizer)
    assert sizes[tokenizer.token_to_id(SPECIAL)] == 0
    assert sizes[tokenizer.token_to_id("<think>")] == 7
    assert sizes[tokenizer.token_to_id("é你")] == 5
    assert total(tokenizer, f"a{SPECIAL}<think>b") == 9


def test_the_tokens_of_a_byte_are_one_byte() -> None:
    for tokenizer in (llama2(), gemma(), unigram()):
        sizes = bytes_of_tokens(tokenizer)
        assert (np.array([sizes[tokenizer.token_to_id(byte)] for byte in BYTES]) == 1).all()
        assert sizes[tokenizer.token_to_id("▁the")] == 4
        assert sizes[tokenizer.token_to_id("你")] == 3
        assert sizes[tokenizer.token_to_id("<unk>")] == 0


def test_without_bytes_apart_such_a_token_is_text() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"<0x0A>": 0, "a": 1}, merges=[]))
    assert bytes_of_tokens(tokenizer).tolist() == [6, 1]


def test_ids_that_no_token_has_stand_for_nothing() -> None:
    tokenizer = Tokenizer(models.WordLevel({"one": 0, "grün": 7}, unk_token="?"))
    assert bytes_of_tokens(tokenizer).tolist() == [3, 0, 0, 0, 0, 0, 0, 5]


@given(st.text(st.sampled_from("abcßnü,. \n"), max_size=30))
def test_wordpiece_counts_all_but_white_space(text: str) -> None:
    letters = "abcßnü,."
    pieces = ["[UNK]", *letters, *(f"##{letter}" for letter in letters), "ab", "##ab", "##"]
    tokenizer = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    assert total(tokenizer, text) == len("".join(text.split()).encode())


def test_the_mark_at_a_words_end_is_no_text() -> None:
    vocabulary = {"a": 0, "a</w>": 1, "b": 2, "b</w>": 3, "ab</w>": 4}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b</w>")], end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder("</w>")
    assert total(tokenizer, "ab a\nb") == 4
    # As CLIP has it.
    tokenizer.decoder = decoders.ByteLevel()
    assert total(tokenizer, "ab a\nb") == 4


def test_a_tokenizer_without_a_decoder_is_read_by_what_comes_before_it() -> None:
    for family in (gpt2, gemma, unigram):
        tokenizer = family()
        with_decoder = bytes_of_tokens(tokenizer)
        undecoded = Tokenizer.from_str(
            re.sub(r'"decoder":\s*\{.*?\},\s*"model"', '"decoder":null,"model"', tokenizer.to_str(), flags=re.DOTALL)
        )
        assert undecoded.decoder is None
        assert np.array_equal(bytes_of_tokens(undecoded), with_decoder)
