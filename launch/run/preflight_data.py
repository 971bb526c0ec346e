"""The data of a run before a rank starts: checked, tokenised, and refused in one sentence where it does not fit."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from regrow.errors import ConfigError
from regrow.launch.config.errors import check_no_hub_name, naming_fields
from regrow.launch.config.resolve import checking
from regrow.launch.config.schema import Config
from regrow.launch.run.build import build_source
from regrow.launch.run.compose_data import compose_windows
from regrow.trainer.data.config import DataConfig, Packing, TextConfig, TokensConfig
from regrow.trainer.data.corpus import Corpus
from regrow.trainer.data.mixture_config import MixtureConfig
from regrow.trainer.data.mixture_source import continue_mixture
from regrow.trainer.data.prepare import cache_folder, prepare
from regrow.trainer.data.source import Source

__all__ = ["PreparedData", "check_data", "prepare_data"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedData:
    """Token stores.

    Attributes:
        training: by their sources' names; one source has the empty name.
        validation: of `data.validation_sets`, by name.
    """

    training: dict[str, Path]
    validation: dict[str, Path]


def prepare_data(config: Config, *, fresh: bool) -> PreparedData:
    """Checks the sources and tokenises what was not tokenised before.

    Args:
        config: of the run.
        fresh: whether the run begins. Of one that goes on, its ranks know what it has read.

    Raises:
        ConfigError: the corpus or the tokenizer does not fit.
        FileNotFoundError: a file is missing.
    """
    if getattr(config.data, "tokenizer", None):
        check_no_hub_name("data.tokenizer", str(config.data.tokenizer))
    if config.data.reset_positions and not (config.data.document_mask or config.data.packing is Packing.best_fit):
        raise ConfigError(
            "data.document_mask must be true with data.reset_positions=true, where a position would occur twice to "
            "what it attends to, but is false; use data.document_mask=true or data.packing=best_fit"
        )
    source = build_source(config.data)
    with checking():
        source.check()
    children = source.children()
    if not children:
        folders = {"": _prepare_source(config, source, config.data)}
    else:
        folders = {name: _prepare_part(config, f"data.sources.{name}", data) for name, data in children.items()}
    corpus = Corpus(folders)
    check_data(config, corpus, fresh=fresh)
    # What is measured is tokenised as what is trained on, by a tokenizer that was trained on that if need be.
    shared = dataclasses.replace(config.data, tokenizer=config.data.tokenizer or str(corpus.tokenizer_file))
    validation = {
        name: _prepare_part(config, f"data.validation_sets.{name}", part.alone(shared))
        for name, part in sorted(config.data.validation_sets.items())
    }
    # Its tokenizer is compared too.
    Corpus({**{f"the training data {n}".strip(): f for n, f in folders.items()}, **validation})
    return PreparedData(training=folders, validation=validation)


def _prepare_part(config: Config, section: str, data: DataConfig) -> Path:
    """A source among several: what is wrong with it is said by the fields that it has there.

    Raises:
        ConfigError: see `prepare_data`.
        FileNotFoundError: likewise.
    """
    own = {f.name for f in dataclasses.fields(type(data))} - {f.name for f in dataclasses.fields(DataConfig)}
    try:
        source = build_source(data, section)
        with checking():
            source.check()
        return _prepare_source(config, source, data)
    except (ConfigError, FileNotFoundError) as error:
        fields = "|".join(sorted(own))
        sentence = re.sub(rf"\bdata\.({fields})\b", rf"{section}.\1", str(error)) if own else str(error)
        raise type(error)(sentence) from error


def _prepare_source(config: Config, source: Source, data: DataConfig) -> Path:
    with naming_fields(("data.cache", cache_folder(data)), *_data_places(data)):
        return prepare(source, lambda size: _check_vocabulary(config, size))


def _data_places(data: DataConfig) -> list[tuple[str, str | Path | None]]:
    """Where the data's fields say that something is read."""
    places: list[tuple[str, str | Path | None]] = [("data.tokenizer", getattr(data, "tokenizer", None))]
    if isinstance(data, TokensConfig):
        places.append(("data.path", data.path))
    if isinstance(data, TextConfig):
        # The folder in which a pattern begins to match.
        places += [("data.files", re.split(r"[^/]*[*?[]", pattern, maxsplit=1)[0] or ".") for pattern in data.files]
    return places


def check_data(config: Config, corpus: Corpus, *, fresh: bool) -> None:
    """Whether model and corpus fit together.

    Args:
        config: of the run.
        corpus: what it reads.
        fresh: see `prepare_data`.

    Raises:
        ConfigError: naming field, rule, value and remedy.
    """
    _check_vocabulary(config, corpus.vocab_size)
    windows = compose_windows(config, corpus, validation=False)
    for name, of_source in windows.items():
        if not len(of_source):
            raise ConfigError(
                f"{f'data.sources.{name}' if name else 'data'} must hold at least one sequence of data.seq_len + 1 "
                f"tokens outside the validation split, but the corpus has {corpus.stores[name].index.tokens} tokens "
                f"in all and data.seq_len is {config.data.seq_len}; add text or lower data.seq_len"
            )
        if not of_source.labels(np.arange(len(of_source))).any():
            raise ConfigError(
                f"{f'data.sources.{name}' if name else 'data'} must hold a token that counts as a label outside the "
                "validation split, but has none; see which turns count (data.labels)"
            )
    if fresh and isinstance(config.data, MixtureConfig):
        counts = {name: len(w) for name, w in windows.items()}
        continue_mixture(config.data, counts, steps=config.train.steps, before=None, at_sample=0)


def _check_vocabulary(config: Config, size: int) -> None:
    """Whether the model has a row for every id below `size`.

    Raises:
        ConfigError: it has fewer.
    """
    if size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size must be at least the tokenizer's ({size}), but is {config.model.vocab_size}; "
            f"use model.vocab_size={size} or another data.tokenizer"
        )
