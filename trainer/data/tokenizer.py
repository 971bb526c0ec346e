"""Tokenizers: loading a Hugging Face `tokenizer.json`, or training a byte-level BPE on the corpus."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

__all__ = ["END_OF_TEXT", "end_of_text_id", "load_tokenizer", "tokenizer_file", "tokenizer_hash", "train_bpe"]

END_OF_TEXT = "<|endoftext|>"
_COMMON_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")
_TRAIN_BYTES = 64 << 20


def tokenizer_file(path: str) -> Path:
    """The `tokenizer.json` at `path`, a file or a folder.

    Raises:
        FileNotFoundError: there is none.
    """
    file = Path(path).expanduser()
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(
            f"data.tokenizer must be a tokenizer.json or a folder with one, but {path} is not; check the path"
        )
    return file


def load_tokenizer(file: Path) -> Tokenizer:
    """Reads a tokenizer; raises ValueError where the file is none."""
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(
            f"data.tokenizer must be a Hugging Face tokenizer.json, but {file} is not ({error})"
        ) from error


def tokenizer_hash(file: Path) -> str:
    """Identifies a tokenizer by its file's bytes."""
    return hashlib.blake2b(file.read_bytes(), digest_size=8).hexdigest()


def end_of_text_id(tokenizer: Tokenizer, file: Path, eos_token: str | None) -> int:
    """The id of the token between documents.

    Args:
        tokenizer: the tokenizer.
        file: where it was read from; a `tokenizer_config.json` beside it may name the token.
        eos_token: `data.eos_token`.

    Raises:
        ValueError: none can be found.
    """
    candidates: list[str] = []
    if eos_token is not None:
        candidates = [eos_token]
    else:
        beside = file.with_name("tokenizer_config.json")
        if beside.is_file():
            named = json.loads(beside.read_text()).get("eos_token")
            named = named.get("content") if isinstance(named, dict) else named
            candidates += [named] if isinstance(named, str) else []
        candidates += _COMMON_ENDS
    for candidate in candidates:
        found = tokenizer.token_to_id(candidate)
        if found is not None:
            return int(found)
    raise ValueError(
        f"data.eos_token must name a token of {file}, but none of {', '.join(candidates)} is one; set data.eos_token"
    )


def _head(documents: Iterable[str], limit: int) -> Iterator[str]:
    """Documents until `limit` characters have passed."""
    seen = 0
    for text in documents:
        yield text
        seen += len(text)
        if seen >= limit:
            return


def train_bpe(documents: Iterable[str], vocab_size: int, file: Path) -> None:
    """Trains a byte-level BPE (Radford et al. 2019) on the corpus' first 64 MB and writes it to `file`.

    The same documents give the same tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_head(documents, _TRAIN_BYTES), trainer)
    temporary = file.with_suffix(".tmp")
    tokenizer.save(str(temporary))
    temporary.rename(file)
