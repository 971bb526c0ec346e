"""`regrow.compose`: a command's overrides to the config that the command would train with."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra

from regrow.launch.config.errors import UserError, check_arguments, describe
from regrow.launch.config.run_name import register_resolver
from regrow.launch.config.schema import Config, register_schemas
from regrow.launch.config.typed import to_config

__all__ = ["compose"]


def compose(overrides: Sequence[str] = ()) -> Config:
    """The typed config that `regrow OVERRIDES…` would use.

    The name of the run (`config.run.name`) is made from these overrides. Compose again for another learning rate,
    model or seed, rather than assigning to the fields: the name would still be that of the first values.

    Args:
        overrides: as on the command line, one element each: `"train.steps=20"`, `"model=qwen3_debug"`.

    Raises:
        ValueError: an override cannot be used; one sentence that says which, why, and what to write instead.
    """
    if isinstance(overrides, str):
        raise UserError(
            f"regrow.compose takes a list of overrides, but is given the text {overrides!r}; write "
            f"regrow.compose([{overrides!r}])"
        )
    flag = next((o for o in overrides if o.startswith("-")), None)
    if flag is not None and "." not in flag:
        raise UserError(
            f"regrow.compose takes overrides alone, but is given {flag}; flags are for the command, and a sweep is a "
            "loop here"
        )
    register_resolver()
    register_schemas()
    try:
        check_arguments(overrides)
        with _own_hydra():
            return to_config(hydra_compose("config", overrides=list(overrides)))
    except Exception as error:
        sentence = describe(error)
        if sentence is None:
            raise
        raise UserError(sentence) from error


@contextmanager
def _own_hydra() -> Iterator[None]:
    """Hydra with our configs; one that the caller has set up for a program of their own comes back afterwards."""
    theirs = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("regrow.conf", version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().hydra = theirs
