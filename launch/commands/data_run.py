"""The data of a run that is not started: what `regrow-data preview` and `mix` look at."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from regrow.launch.config.composition import compose_config
from regrow.launch.config.errors import check_arguments
from regrow.launch.config.refusals import Refused, refusing
from regrow.launch.config.schema import Config
from regrow.launch.run.build import build_source
from regrow.launch.run.compose_data import compose_samples, compose_windows
from regrow.launch.run.preflight import check_config
from regrow.launch.run.preflight_data import prepare_data
from regrow.launch.run.prepare import convert_config
from regrow.trainer.data.corpus import Corpus
from regrow.trainer.data.mixture import Mixture, Stage
from regrow.trainer.data.mixture_config import MixtureConfig
from regrow.trainer.data.mixture_source import continue_mixture, declared_mixture
from regrow.trainer.data.samples import Samples
from regrow.trainer.data.source import CorpusSource
from regrow.trainer.data.windows import Windows

__all__ = ["ONLY", "RunData", "composed", "composed_source", "prepare_run_data"]

# What the source of a run without a mixture is called.
ONLY = "data"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunData:
    """What a run would read from its beginning on.

    Attributes:
        config: of the run.
        corpus: its token stores.
        windows: of the training split, by source; one source is called `ONLY`.
        declared: which sample is of which source, as the config says.
        mixture: the same, without sources that are used up.
    """

    config: Config
    corpus: Corpus
    windows: dict[str, Windows]
    declared: Mixture
    mixture: Mixture

    @property
    def count(self) -> int:
        """Samples of the whole run."""
        return self.config.train.steps * self.config.data.global_batch_size

    def samples(self) -> Samples:
        """In the order in which they are read."""
        mixture = self.mixture if isinstance(self.config.data, MixtureConfig) else None
        return compose_samples(self.config, self.corpus, self.windows, mixture)


def composed(overrides: Sequence[str], config_dir: Path | None = None) -> Config:
    """The config of a run, checked as far as that needs no data.

    Args:
        overrides: as `regrow` takes them.
        config_dir: a folder of configs beside Regrow's own.

    Raises:
        Refused: in the sentence that the run would give.
    """
    searched = []
    if config_dir is not None:
        if not config_dir.is_dir():
            raise Refused(f"--config-dir must be a folder of configs, but {config_dir} is none; check the path")
        quoted = str(config_dir.absolute()).replace("'", "\\'")
        searched = [f"hydra.searchpath=['file://{quoted}']"]
    with refusing():
        check_arguments(overrides)
        config, _ = convert_config(compose_config([*searched, *overrides]))
        check_config(config)
    return config


def composed_source(overrides: Sequence[str]) -> CorpusSource:
    """The source of text that overrides of `data` name.

    Raises:
        Refused: in the sentence that a run would give, or because there is nothing to tokenise.
    """
    config = composed(overrides)
    with refusing():
        source = build_source(config.data)
    if not isinstance(source, CorpusSource):
        raise Refused(
            f"data must be a source of documents to tokenise, but is {config.data._target_}; tokenise the sources of "
            "a mixture one by one, or let the run do it"
        )
    return source


def prepare_run_data(config: Config) -> RunData:
    """Prepares a run's data as the run would; nothing of the run itself is touched.

    Raises:
        Refused: in the sentence that the run would give.
    """
    data = config.data
    with refusing():
        corpus = Corpus(prepare_data(config, fresh=True).training)
        windows = compose_windows(config, corpus, validation=False)
        if isinstance(data, MixtureConfig):
            declared = declared_mixture(data)
            counts = {name: len(of_source) for name, of_source in windows.items()}
            mixture, _ = continue_mixture(data, counts, steps=config.train.steps, before=None, at_sample=0)
        else:
            windows = {ONLY: windows[""]}
            declared = mixture = Mixture((ONLY,), (Stage(0, (Fraction(1),)),))
    return RunData(config=config, corpus=corpus, windows=windows, declared=declared, mixture=mixture)
