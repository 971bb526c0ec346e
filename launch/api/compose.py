"""`regrow.compose`: a command's overrides to the config that the command would train with."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hydra.core.global_hydra import GlobalHydra

from regrow.errors import ConfigError
from regrow.launch.config.composition import compose_config
from regrow.launch.config.errors import check_arguments
from regrow.launch.config.refusals import refusing
from regrow.launch.config.schema import Config
from regrow.launch.config.typed import to_config

__all__ = ["compose"]


def compose(overrides: Sequence[str] = ()) -> Config:
    """The typed config that `regrow OVERRIDES…` would use.

    The name of the run (`config.run.name`) is made from these overrides. Compose again for another learning rate,
    model or seed, rather than assigning to the fields: the name would still be that of the first values.

    Args:
        overrides: as on the command line, one element each: `"train.steps=20"`, `"model=qwen3_debug"`.

    Raises:
        ConfigError: an override cannot be used; one sentence that says which, why, and what to write instead.
    """
    if isinstance(overrides, str):
        raise ConfigError(
            f"regrow.compose takes a list of overrides, but is given the text {overrides!r}; write "
            f"regrow.compose([{overrides!r}])"
        )
    flag = next((o for o in overrides if o.startswith("-")), None)
    if flag is not None and "." not in flag:
        raise ConfigError(
            f"regrow.compose takes overrides alone, but is given {flag}; flags are for the command, and a sweep is a "
            "loop here"
        )
    with refusing(), _hydra_of_the_caller_kept():
        check_arguments(overrides)
        return to_config(compose_config(overrides))


@contextmanager
def _hydra_of_the_caller_kept() -> Iterator[None]:
    """A program that has set up Hydra for configs of its own finds it again afterwards."""
    theirs = GlobalHydra.instance().hydra
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = theirs
