"""Schemas of the data sources."""

import dataclasses
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from omegaconf import MISSING

__all__ = ["DataConfig", "Packing", "StdlibConfig", "TextConfig", "TokensConfig", "TooLong"]


class Packing(Enum):
    """How documents become sequences.

    `concat` lays them end to end and cuts that into sequences, wherever documents begin and end. `best_fit` puts
    whole documents together so that they fill sequences as well as may be; attention then keeps within documents.
    """

    concat = "concat"
    best_fit = "best_fit"


class TooLong(Enum):
    """What becomes of a document with more labels than a sequence has positions, where documents are packed.

    `drop` leaves it out. `cut` keeps its first labels, as many as fill a sequence. `split` makes pieces that fill a
    sequence each, and one of what is left; a piece begins with the token that the one before ends with, its last
    label, so that every label is in one piece.
    """

    drop = "drop"
    cut = "cut"
    split = "split"


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """What every source has.

    Attributes:
        seq_len: tokens a sequence.
        global_batch_size: sequences an optimizer step, over all ranks.
        micro_batch_size: sequences a forward pass on a rank; the rest is accumulated.
        document_mask: attention does not cross document boundaries; with `packing=best_fit` it never does.
        packing: how documents become sequences.
        too_long: with `packing=best_fit`, what becomes of documents longer than a sequence.
        validation_fraction: part of the documents held out, chosen by their hash.
        tokenizer: a Hugging Face `tokenizer.json` or a folder that holds one; null trains a byte-level BPE
            on the corpus.
        tokenizer_vocab_size: size of that BPE.
        eos_token: the token between documents; null finds the tokenizer's own.
        cache: where tokenised corpora are kept; null is `~/.cache/regrow`.
        workers: processes that tokenise; 0 is one per core.
        prefetch: batches read ahead.
        log_samples: write each step's sample ids to `samples.jsonl`.
    """

    _target_: str = MISSING
    seq_len: int = MISSING
    global_batch_size: int = MISSING
    micro_batch_size: int = MISSING
    document_mask: bool = False
    packing: Packing = dataclasses.field(default=Packing.concat, metadata={"since": "0.2.0"})
    too_long: TooLong = dataclasses.field(default=TooLong.split, metadata={"since": "0.2.0"})
    validation_fraction: float = 0.05
    tokenizer: str | None = None
    tokenizer_vocab_size: int = 4096
    eos_token: str | None = None
    cache: str | None = None
    workers: int = 0
    prefetch: int = 2
    log_samples: bool = False


@dataclass(kw_only=True, slots=True)
class StdlibConfig(DataConfig):
    """English prose and code of the running Python's own standard library."""

    SCHEMA: ClassVar[tuple[str, str]] = ("data", "stdlib_schema")
    _target_: str = "regrow.trainer.data.stdlib.StdlibSource"


@dataclass(kw_only=True, slots=True)
class TextConfig(DataConfig):
    """Files of text.

    Attributes:
        files: paths and globs of .txt, .jsonl (also .gz, .zst) and .parquet files.
        field: the text's field in .jsonl and .parquet.
        txt_document_bytes: .txt files are cut at blank lines into documents of about this size; 0 leaves
            a file whole.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("data", "text_schema")
    _target_: str = "regrow.trainer.data.text.TextSource"
    files: list[str] = dataclasses.field(default_factory=list)
    field: str = "text"
    txt_document_bytes: int = 16384


@dataclass(kw_only=True, slots=True)
class TokensConfig(DataConfig):
    """A folder made by `regrow-data tokenize`.

    Attributes:
        path: that folder.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("data", "tokens_schema")
    _target_: str = "regrow.trainer.data.token_store.TokensSource"
    path: str = MISSING
