"""What a rank reads: its corpus as samples, and its batches from any state on."""

from collections.abc import Callable

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
from regrow.trainer.data.token_store import TokenStore
from regrow.trainer.data.windows import ConcatWindows, Windows
from regrow.trainer.parallel.context import ParallelContext
from regrow.trainer.state import TrainState

__all__ = ["batches_of", "compose_windows", "keeps_within_documents", "validation_samples"]


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


def keeps_within_documents(data: DataConfig) -> bool:
    """Whether attention is kept within documents: asked for, or some are packed."""
    parts = data.sources.values() if isinstance(data, MixtureConfig) else ()
    packings = [data.packing, *(part.packing for part in parts)]
    return data.document_mask or Packing.best_fit in packings


def _samples(config: Config, windows: dict[str, Windows], mixture: Mixture | None) -> Samples:
    """The sequence of samples; a mixture may have more sources than there are now, which have been read before."""
    if mixture is None:
        return Samples(list(windows), list(windows.values()), [config.seed])
    parts = config.data.sources if isinstance(config.data, MixtureConfig) else {}
    seeds = [
        seed if (seed := parts[name].seed) is not None else source_seed(config.seed, name) for name in mixture.names
    ]
    return Samples(mixture.names, [windows[name] for name in mixture.names], seeds, mixture)


def validation_samples(config: Config, corpus: Corpus) -> Samples:
    """The held-out samples, which are read by number and in no order."""
    windows = compose_windows(config, corpus, validation=True)
    mixture = declared_mixture(config.data) if isinstance(config.data, MixtureConfig) else None
    return _samples(config, windows, mixture)


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
            _samples(config, windows, mixture),
            samples_consumed=state.samples_consumed,
            global_batch_size=data.global_batch_size,
            rank=context.data_rank,
            ranks=context.layout.data_ranks,
            micro_batch_size=data.micro_batch_size,
            document_mask=keeps_within_documents(data),
            depth=data.prefetch,
            finish=pinned if context.device.type == "cuda" else None,
        )
        return feed(batches, context.device)

    return make
