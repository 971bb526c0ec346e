"""`corpus.json`: everything that decides a token store's bytes, kept in it and part of a cached one's name; and what
decides the bytes of one file's shards.
"""

import copy
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from regrow.checkpoint.documents import DocumentError, read_document
from regrow.checkpoint.files import read_regular
from regrow.trainer.data.config import FileFields
from regrow.trainer.data.source import CorpusPart, CorpusSource, DataError, digest, shown
from regrow.trainer.data.tokenizer import TokenizerFiles, tokenizer_hash

__all__ = ["RECIPE", "Recipe", "check_recipe", "file_key", "file_options", "recipe_key", "recipe_of"]

RECIPE = "corpus.json"
# Raised whenever the same files and options give other tokens.
_READER = "2"
_RECIPE_BYTES = 1 << 20

_Text = Annotated[str, Meta(max_length=1 << 16)]
# What decided the bytes, by the name that a message gives it.
Recipe = Annotated[dict[_Text, _Text], Meta(max_length=100)]


def recipe_of(source: CorpusSource, given: TokenizerFiles | None) -> dict[str, str]:
    """What decides the tokens of a source.

    Args:
        source: of the text.
        given: the tokenizer; None trains one.

    Raises:
        DataError: the corpus cannot be read.
    """
    config = source.config
    if given is None:
        tokenizer = {
            "data.tokenizer": "null",
            "data.tokenizer_vocab_size": str(config.tokenizer_vocab_size),
            "data.eos_token": config.eos_token or "null",
        }
    else:
        tokenizer = {
            "data.tokenizer": f"a file with hash {tokenizer_hash(given.body)}",
            "data.eos_token": " or ".join(given.ends),
        }
    begin = {} if config.bos_token is None else {"data.bos_token": config.bos_token}
    return {"the version of the reader": _READER, **source.key(), **tokenizer, **begin}


def recipe_key(recipe: dict[str, str]) -> str:
    """A name for the store."""
    return digest(json.dumps(recipe, sort_keys=True))


def file_options(source: CorpusSource) -> dict[str, str] | None:
    """What decides the documents of each of the source's files beside the file: the key of a corpus of no files.

    Args:
        source: of files, each of which is read by itself; of another source there is nothing of the kind.

    Raises:
        DataError: see `CorpusSource.key`.
    """
    config = source.config
    if not isinstance(config, FileFields):
        return None
    without = copy.copy(config)
    without.files = []
    return type(source)(without).key()


def file_key(
    options: dict[str, str], *, content: str, ending: str, parts: Sequence[CorpusPart], encoding: dict[str, str]
) -> str:
    """A name for the shards of one file: of everything that decides their bytes, and not of where the file lies.

    Args:
        options: see `file_options`.
        content: identifies the file's bytes.
        ending: says how it is read.
        parts: of the file, each of which is a shard.
        encoding: how text becomes ids.
    """
    bounds = [[part.start, part.stop] for part in parts]
    decides = {"reader": _READER, "options": options, "content": content, "ending": ending, "parts": bounds}
    body = json.dumps({**decides, "encoding": encoding}, sort_keys=True)
    return hashlib.blake2b(body.encode(errors="surrogatepass"), digest_size=16).hexdigest()


def check_recipe(folder: Path, recipe: dict[str, str]) -> None:
    """Whether what lies in `folder` was made in the same way; an empty folder will be.

    Raises:
        DataError: it was not, with what differs.
        OSError: the folder cannot be written.
    """
    path = folder / RECIPE
    try:
        found = read_document(read_regular(path, _RECIPE_BYTES), Recipe)
    except FileNotFoundError:
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(recipe, indent=1))
        temporary.rename(path)
        return
    except (DocumentError, OSError) as error:
        raise DataError(f"{path} cannot be used: {shown(str(error))}; remove the folder and tokenize again") from None
    for name in [*recipe, *found]:
        made, wanted = found.get(name, "not given"), recipe.get(name, "not given")
        if made != wanted:
            raise DataError(
                f"{folder} must be empty or made with the same options, but {shown(name)} was {shown(made)} and is "
                f"{shown(wanted)} now; choose another folder, or remove this one"
            )
