"""Schemas of the data sources."""

import dataclasses
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

from omegaconf import MISSING

__all__ = [
    "ChatConfig",
    "ChatFields",
    "DataConfig",
    "FileFields",
    "LabelMode",
    "OnBadRecord",
    "Packing",
    "SourcePart",
    "StdlibConfig",
    "TextConfig",
    "TextFields",
    "TokensConfig",
    "TooLong",
]

_LATER = {"since": "0.2.0"}


class Packing(Enum):
    """How documents become sequences.

    Attributes:
        concat: end to end, cut into sequences wherever documents begin and end.
        best_fit: whole documents are put together so that they fill sequences as well as may be; attention then keeps
            within documents.
    """

    concat = "concat"
    best_fit = "best_fit"


class TooLong(Enum):
    """What becomes of a document with more labels than a sequence has positions, where documents are packed.

    Attributes:
        drop: it is left out.
        cut: its first labels are kept, as many as fill a sequence.
        split: it becomes pieces that fill a sequence each, and one of what is left; a piece begins with the token
            that the one before ends with, its last label, so that every label is in one piece.
    """

    drop = "drop"
    cut = "cut"
    split = "split"


@dataclass(kw_only=True, slots=True)
class SourcePart:
    """A source of a mixture. What it does not say (tokenizer, `seq_len`, …) is the mixture's.

    Attributes:
        weight: its share of the samples, relative to the others'; 0 leaves it out until a stage names it.
        max_epochs: how often its windows may be read, whole or in part; null is without end.
        seed: seed of its order; null makes one of the run's seed and its name.
        packing: how its documents become sequences; null is as the mixture says.
    """

    CONFIG: ClassVar[type["DataConfig"]]
    weight: float = 1.0
    max_epochs: float | None = None
    seed: int | None = None
    packing: Packing | None = None

    def alone(self, shared: "DataConfig") -> "DataConfig":
        """The config of this source by itself.

        Args:
            shared: the mixture's, whose fields it has where it has none of its own.
        """
        own = {f.name for f in dataclasses.fields(self)}
        values: dict[str, Any] = {}
        for field in dataclasses.fields(self.CONFIG):
            if field.name in ("_target_", "validation_sets"):
                continue
            if field.name in own and (value := getattr(self, field.name)) is not None:
                values[field.name] = value
            elif hasattr(shared, field.name):
                values[field.name] = getattr(shared, field.name)
        return self.CONFIG(**values)


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """What every source has.

    Attributes:
        TOKENISED: the source is a token store, which has its tokenizer.
        _target_: the source's class, called with this config.
        seq_len: tokens a sequence.
        global_batch_size: sequences an optimizer step, over all ranks.
        micro_batch_size: sequences a forward pass on a rank; the rest is accumulated.
        document_mask: attention does not cross document boundaries; with `packing=best_fit` it never does.
        reset_positions: positions begin anew with each document, where attention keeps within documents; with rotary
            embeddings, which are relative, that changes rounding alone.
        packing: how documents become sequences.
        too_long: with `packing=best_fit`, what becomes of documents longer than a sequence.
        validation_fraction: part of the documents held out, chosen by their hash.
        tokenizer: a Hugging Face `tokenizer.json` or a folder that holds one; null trains a byte-level BPE
            on the corpus.
        tokenizer_vocab_size: tokens of that BPE, where one is trained.
        eos_token: the token after each document; null finds the tokenizer's own.
        bos_token: the token before each document of text; null is none. Conversations begin as their template says.
        cache: where tokenised corpora are kept; null is `~/.cache/regrow`.
        workers: processes that tokenise; 0 is one per core.
        prefetch: batches read ahead, at least 1.
        log_samples: write each step's sample ids to `samples.jsonl`.
        validation_sets: further sources, of which nothing is trained on, by a name of your choice.
    """

    TOKENISED: ClassVar[bool] = False
    _target_: str = MISSING
    seq_len: int = MISSING
    global_batch_size: int = MISSING
    micro_batch_size: int = MISSING
    document_mask: bool = False
    reset_positions: bool = dataclasses.field(default=False, metadata=_LATER)
    packing: Packing = dataclasses.field(default=Packing.concat, metadata=_LATER)
    too_long: TooLong = dataclasses.field(default=TooLong.split, metadata=_LATER)
    validation_fraction: float = 0.05
    tokenizer: str | None = None
    tokenizer_vocab_size: int = 4096
    eos_token: str | None = None
    bos_token: str | None = dataclasses.field(default=None, metadata=_LATER)
    cache: str | None = None
    workers: int = 0
    prefetch: int = 2
    log_samples: bool = False
    validation_sets: dict[str, SourcePart] = dataclasses.field(default_factory=dict, metadata=_LATER)


@dataclass(kw_only=True, slots=True)
class StdlibConfig(DataConfig):
    """English prose and code of the running Python's own standard library."""

    SCHEMA: ClassVar[tuple[str, str]] = ("data", "stdlib_schema")
    _target_: str = "regrow.trainer.data.stdlib.StdlibSource"


class OnBadRecord(Enum):
    """What a record that cannot be used does.

    Attributes:
        stop: it ends the reading, and the command.
        skip: it is left out and counted.
    """

    stop = "stop"
    skip = "skip"


class LabelMode(Enum):
    """Which tokens of a conversation are labels.

    Attributes:
        assistant: all turns of the assistant.
        last: its last turn.
        all: every token.
    """

    assistant = "assistant"
    last = "last"
    all = "all"


# Without slots, so that a source alone and a source of a mixture can have these fields beside their own.
@dataclass(kw_only=True)
class FileFields:
    """What every source of files has.

    Attributes:
        files: paths, globs and URLs (s3://, gs://, az://, whatever fsspec opens) of .txt, .jsonl (also .gz, .zst,
            .bz2, .xz), .parquet and .arrow files, and folders that Hugging Face's `datasets` saved.
        where: by field, the value or list of values that a record must have to be used.
        where_min: by field, the least number that a record must have to be used.
        where_max: by field, the largest number that a record may have to be used.
        on_bad_record: what a line that is no record, or one without a text, does.
        max_bad_records: bad records skipped at most in each part of a file (64 MiB of .jsonl, a row group, 64 MiB of
            an Arrow file; a compressed file or a stream is one part); one more stops the reading.
    """

    files: list[str] = dataclasses.field(default_factory=list)
    where: dict[str, Any] = dataclasses.field(default_factory=dict, metadata=_LATER)
    where_min: dict[str, float] = dataclasses.field(default_factory=dict, metadata=_LATER)
    where_max: dict[str, float] = dataclasses.field(default_factory=dict, metadata=_LATER)
    on_bad_record: OnBadRecord = dataclasses.field(default=OnBadRecord.stop, metadata=_LATER)
    max_bad_records: int = dataclasses.field(default=1000, metadata=_LATER)


@dataclass(kw_only=True)
class TextFields(FileFields):
    """What a source of text has.

    Attributes:
        field: the text's field in records (.jsonl, .parquet, .arrow); a dotted path leads into nested ones where no
            field has that very name.
        txt_document_bytes: .txt files are cut at blank lines into documents of about this size; 0 leaves
            a file whole.
        fields: several fields instead of `field`; those that are null or empty in a record are left out.
        join: stands between the texts of `fields`; \\n is the end of a line, \\t a tab.
    """

    field: str = "text"
    txt_document_bytes: int = 16384
    fields: list[str] = dataclasses.field(default_factory=list, metadata=_LATER)
    join: str = dataclasses.field(default="\n\n", metadata=_LATER)


@dataclass(kw_only=True)
class ChatFields(FileFields):
    """What a source of conversations has.

    Attributes:
        template: which of the tokenizer's chat templates; null chooses as transformers does.
        template_date: the day, as 2026-01-31, that a template gets that asks for it.
        labels: which tokens are labels.
    """

    template: str | None = None
    template_date: str | None = None
    labels: LabelMode = LabelMode.assistant


@dataclass(kw_only=True, slots=True)
class TextConfig(TextFields, DataConfig):
    """Files of text."""

    SCHEMA: ClassVar[tuple[str, str]] = ("data", "text_schema")
    _target_: str = "regrow.trainer.data.text.TextSource"


@dataclass(kw_only=True, slots=True)
class ChatConfig(ChatFields, DataConfig):
    """Files of conversations: `messages`, ShareGPT's `conversations`, or `prompt` and `completion`."""

    SCHEMA: ClassVar[tuple[str, str]] = ("data", "chat_schema")
    _target_: str = "regrow.trainer.data.chat.source.ChatSource"
    packing: Packing = Packing.best_fit


@dataclass(kw_only=True, slots=True)
class TokensConfig(DataConfig):
    """A folder made by `regrow-data tokenize`.

    Attributes:
        path: the folder that `regrow-data tokenize` wrote.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("data", "tokens_schema")
    TOKENISED: ClassVar[bool] = True
    _target_: str = "regrow.trainer.data.token_store.TokensSource"
    path: str = MISSING
