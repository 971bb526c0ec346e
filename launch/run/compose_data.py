"""What a rank reads: its corpus as samples, and its batches from any state on."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from regrow.launch.config.schema import Config
from regrow.trainer.data.cache import cache_folder
from regrow.trainer.data.config import DataConfig, Packing
from regrow.trainer.data.corpus import Corpus
from regrow.trainer.data.feed import feed, pinned
from regrow.trainer.data.loader import Batches, Prefetcher
from regrow.trainer.data.mixture import Mixture
from regrow.trainer.data.mixture_config import MixtureConfig
from regrow.trainer.data.mixture_source import continue_mixture, declared_mixture
from regrow.trainer.data.packed_windows import PackedWindows
from regrow.trainer.data.samples import Samples, source_seed
from regrow.trainer.data.token_bytes import bytes_of_tokens
from regrow.trainer.data.token_store import TokenStore
from regrow.trainer.data.tokenizer import load_tokenizer
from regrow.trainer.data.windows import ConcatWindows, Int64s, Windows
from regrow.trainer.parallel.context import ParallelContext
from regrow.trainer.state import TrainState

__all__ = ["batches_of", "compose_samples", "compose_windows", "validation_samples"]


def compose_windows(config: Config, corpus: Corpus, *, validation: bool) -> dict[str, Windows]:
    """The split of each source, by its name."""
    data = config.data
    if not isinstance(data, MixtureConfig):
        return {name: _windows_of(data, store, validation=validation) for name, store in corpus.stores.items()}
    return {
        name: _windows_of(data.sources[name].alone(data), store, validation=validation)
        for name, store in corpus.stores.items()
    }


def _windows_of(data: DataConfig, store: TokenStore, *, validation: bool) -> Windows:
    if data.packing is Packing.concat:
        return ConcatWindows(store, data.seq_len, data.validation_fraction, validation=validation)
    return PackedWindows(
        store,
        data.seq_len,
        data.validation_fraction,
        validation=validation,
        too_long=data.too_long,
        cache=cache_folder(data) / "packings",
        mask=store.labels,
    )


def compose_samples(config: Config, corpus: Corpus, windows: dict[str, Windows], mixture: Mixture | None) -> Samples:
    """The samples in the order in which they are read.

    Args:
        config: of the run.
        corpus: its token stores.
        windows: of one split, by source.
        mixture: which sample is of which source; it may have more sources than there are now, which have been read
            before. None: there is one source.
    """
    token_bytes = _token_bytes(corpus.tokenizer_file)
    if mixture is None:
        return Samples(list(windows), list(windows.values()), [config.seed], token_bytes=token_bytes)
    parts = config.data.sources if isinstance(config.data, MixtureConfig) else {}
    seeds = [
        seed if (seed := parts[name].seed) is not None else source_seed(config.seed, name) for name in mixture.names
    ]
    of_sources = [windows[name] for name in mixture.names]
    return Samples(mixture.names, of_sources, seeds, mixture, token_bytes=token_bytes)


def validation_samples(config: Config, corpus: Corpus, sets: Mapping[str, Path]) -> dict[str, Samples]:
    """What losses are measured on, by name: the split's held-out samples (the empty name) and further sets, whole.

    Args:
        config: of the run.
        corpus: that the run trains on.
        sets: the stores of `data.validation_sets`.
    """
    windows = compose_windows(config, corpus, validation=True)
    mixture = declared_mixture(config.data) if isinstance(config.data, MixtureConfig) else None
    found = {"": compose_samples(config, corpus, windows, mixture)}
    whole = dataclasses.replace(config.data, validation_fraction=0.0)
    for name, folder in sets.items():
        store = TokenStore(folder)
        of_set = _windows_of(config.data.validation_sets[name].alone(whole), store, validation=False)
        found[name] = Samples([""], [of_set], [config.seed], token_bytes=_token_bytes(store.tokenizer_file))
    return found


def _token_bytes(file: Path) -> Int64s:
    return bytes_of_tokens(load_tokenizer(file))


def batches_of(config: Config, context: ParallelContext, corpus: Corpus) -> Callable[[TrainState], Batches]:
    """This rank's batches from any state on; with a mixture, the state then says which samples they are."""
    data = config.data
    windows = compose_windows(config, corpus, validation=False)

    def make(state: TrainState) -> Batches:
        mixture = None
        if isinstance(data, MixtureConfig):
            mixture, state.mixture = continue_mixture(
                data,
                {name: len(w) for name, w in windows.items()},
                steps=config.train.steps,
                before=state.mixture,
                at_sample=state.samples_consumed,
            )
        batches = Prefetcher(
            compose_samples(config, corpus, windows, mixture),
            samples_consumed=state.samples_consumed,
            global_batch_size=data.global_batch_size,
            rank=context.data_rank,
            ranks=context.layout.data_ranks,
            micro_batch_size=data.micro_batch_size,
            document_mask=data.document_mask,
            depth=data.prefetch,
            finish=pinned if context.device.type == "cuda" else None,
        )
        return feed(batches, context.device)

    return make
