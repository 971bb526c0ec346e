"""How many bytes of text each token stands for, which makes a loss per token one per byte.

A tokenizer's parts say how its tokens are written. In byte-level vocabularies (GPT-2, Llama 3, Qwen) each character
of a token is a byte. In the others a token is text, in which "▁" may be a space and `<0x0A>` a byte.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, pre_tokenizers

from regrow.trainer.data.tokenizer import vocabulary_size

__all__ = ["bytes_of_tokens"]

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """A decoder, pre-tokenizer or normalizer, or a list of them."""

    type: str
    decoders: list["_Part"] = field(default_factory=list)
    pretokenizers: list["_Part"] = field(default_factory=list)
    normalizers: list["_Part"] = field(default_factory=list)
    pattern: dict[str, str] | str | None = None
    content: str | None = None
    replacement: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Model:
    """What decides how a model writes its tokens."""

    unk_token: str | None = None
    unk_id: int | None = None
    byte_fallback: bool = False
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None


def bytes_of_tokens(tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
    """How many bytes of UTF-8 each id stands for.

    Summed over a text's ids this is the text's length in bytes, as a normalizer (NFC, lower case) has left it. A
    space that the tokenizer puts before the text is counted: the sum is then one byte more. Vocabularies of words
    (WordPiece, or with a mark at a word's end) do not keep white space, and none is counted. Special tokens are no
    text and stand for 0 bytes, like ids that no token has, and the token for what is unknown.

    Args:
        tokenizer: as it encodes.

    Returns:
        int64 `(ids,)`, one for each id up to the largest.
    """
    model = msgspec.json.decode(tokenizer.model.__getstate__(), type=_Model)
    own = tokenizer.get_vocab(with_added_tokens=False)
    count = _counting(tokenizer, model, own)
    out = np.zeros(vocabulary_size(tokenizer), dtype=np.int64)
    for token, number in own.items():
        out[number] = count(token)
    for number, added in tokenizer.get_added_tokens_decoder().items():
        if added.special:
            out[number] = 0
        elif added.content not in own:
            # It is looked for in the text itself, so it is written as text.
            out[number] = len(added.content.encode())
    unknown = own.get(model.unk_token) if model.unk_token is not None else model.unk_id
    if unknown is not None:
        out[unknown] = 0
    return out


def _counting(tokenizer: Tokenizer, model: _Model, vocabulary: dict[str, int]) -> Callable[[str], int]:
    """What counts the bytes that a token of the model's own stands for."""
    decoder, before = _parts(tokenizer.decoder), _parts(tokenizer.pre_tokenizer)
    prefix, suffix = model.continuing_subword_prefix or "", model.end_of_word_suffix or ""
    if any(part.type == "ByteLevel" for part in [*decoder, *before, *_parts(tokenizer.normalizer)]):
        alphabet = frozenset(pre_tokenizers.ByteLevel.alphabet())

        def byte_level(token: str) -> int:
            token = token.removeprefix(prefix).removesuffix(suffix)
            # As the decoder: a token with any other character is text.
            return len(token) if alphabet.issuperset(token) else len(token.encode())

        return byte_level
    spelled = _spelled(decoder) or _spelled(before) or _spelled_by_normalizer(_parts(tokenizer.normalizer))
    bytes_apart = (
        model.byte_fallback
        or any(part.type == "ByteFallback" for part in decoder)
        or all(token in vocabulary for token in _BYTES)
    )

    def as_text(token: str) -> int:
        if bytes_apart and _BYTE.fullmatch(token):
            return 1
        token = token.removeprefix(prefix).removesuffix(suffix)
        for written, meant in spelled:
            token = token.replace(written, meant)
        return len(token.encode())

    return as_text


def _spelled(parts: list[_Part]) -> list[tuple[str, str]]:
    """What tokens write in place of something else, and that: "▁" and a space."""
    found = []
    for part in parts:
        if part.type == "Metaspace" and part.replacement:
            found.append((part.replacement, " "))
        elif part.type == "Replace" and isinstance(part.pattern, dict) and part.pattern.get("String"):
            found.append((part.pattern["String"], part.content or ""))
    return found


def _spelled_by_normalizer(parts: list[_Part]) -> list[tuple[str, str]]:
    """The same of a normalizer that replaces spaces, where no decoder sets them in again."""
    return [(p.content, " ") for p in parts if p.type == "Replace" and p.content and p.pattern == {"String": " "}]


def _parts(component: Any) -> list[_Part]:
    """The parts of a decoder, pre-tokenizer or normalizer in their order; [] where there is none."""
    return [] if component is None else _flat(msgspec.json.decode(component.__getstate__(), type=_Part))


def _flat(part: _Part) -> list[_Part]:
    inner = [*part.decoders, *part.pretokenizers, *part.normalizers]
    return [one for each in inner for one in _flat(each)] if inner else [part]
