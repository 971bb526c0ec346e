"""Schemas of the data sources."""

import dataclasses
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

from omegaconf import MISSING

__all__ = ["DataConfig", "OnBadRecord", "StdlibConfig", "TextConfig", "TokensConfig"]

_LATER = {"since": "0.2.0"}


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """What every source has.

    Attributes:
        seq_len: tokens a sequence.
        global_batch_size: sequences an optimizer step, over all ranks.
        micro_batch_size: sequences a forward pass on a rank; the rest is accumulated.
        document_mask: attention does not cross document boundaries.
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


class OnBadRecord(Enum):
    """What a record that cannot be used does."""

    stop = "stop"
    skip = "skip"


@dataclass(kw_only=True, slots=True)
class TextConfig(DataConfig):
    """Files of text.

    Attributes:
        files: paths, globs and URLs (s3://, gs://, az://, whatever fsspec opens) of .txt, .jsonl (also .gz, .zst,
            .bz2, .xz), .parquet and .arrow files, and folders that Hugging Face's `datasets` saved.
        field: the text's field in records (.jsonl, .parquet, .arrow); a dotted path leads into nested ones where no
            field has that very name.
        txt_document_bytes: .txt files are cut at blank lines into documents of about this size; 0 leaves
            a file whole.
        fields: several fields instead of `field`; those that are null or empty in a record are left out.
        join: stands between the texts of `fields`; \\n is the end of a line, \\t a tab.
        where: by field, the value or list of values that a record must have to be used.
        where_min: by field, the least number that a record must have to be used.
        where_max: by field, the largest.
        on_bad_record: what no record or has no text stops the reading, or is skipped and counted.
        max_bad_records: skipped at most in each part of a file (64 MiB of .jsonl, a row group, 64 MiB of an Arrow
            file; a compressed file or a stream is one part); one more stops the reading.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("data", "text_schema")
    _target_: str = "regrow.trainer.data.text.TextSource"
    files: list[str] = dataclasses.field(default_factory=list)
    field: str = "text"
    txt_document_bytes: int = 16384
    fields: list[str] = dataclasses.field(default_factory=list, metadata=_LATER)
    join: str = dataclasses.field(default="\n\n", metadata=_LATER)
    where: dict[str, Any] = dataclasses.field(default_factory=dict, metadata=_LATER)
    where_min: dict[str, float] = dataclasses.field(default_factory=dict, metadata=_LATER)
    where_max: dict[str, float] = dataclasses.field(default_factory=dict, metadata=_LATER)
    on_bad_record: OnBadRecord = dataclasses.field(default=OnBadRecord.stop, metadata=_LATER)
    max_bad_records: int = dataclasses.field(default=1000, metadata=_LATER)


@dataclass(kw_only=True, slots=True)
class TokensConfig(DataConfig):
    """A folder made by `regrow-data tokenize`.

    Attributes:
        path: that folder.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("data", "tokens_schema")
    _target_: str = "regrow.trainer.data.token_store.TokensSource"
    path: str = MISSING
