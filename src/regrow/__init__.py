"""A research training framework for language models whose runs grow back after any kill.

The names below are all that a script or a notebook needs; docs/python.md shows them. Each is imported when it is
first used, so that `import regrow` itself loads neither torch nor Hydra.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regrow.errors import ConfigError
    from regrow.launch.api.compose import compose
    from regrow.launch.api.metrics import read_metrics
    from regrow.launch.api.model import load_model
    from regrow.launch.api.runs import Run, runs
    from regrow.launch.api.train import TrainingFailedError, TrainResult, train
    from regrow.launch.config.schema import Config

    __version__: str

__all__ = [
    "Config",
    "ConfigError",
    "Run",
    "TrainResult",
    "TrainingFailedError",
    "__version__",
    "compose",
    "load_model",
    "read_metrics",
    "runs",
    "train",
]

_MODULES = {
    "Config": "regrow.launch.config.schema",
    "ConfigError": "regrow.errors",
    "Run": "regrow.launch.api.runs",
    "TrainResult": "regrow.launch.api.train",
    "TrainingFailedError": "regrow.launch.api.train",
    "compose": "regrow.launch.api.compose",
    "load_model": "regrow.launch.api.model",
    "read_metrics": "regrow.launch.api.metrics",
    "runs": "regrow.launch.api.runs",
    "train": "regrow.launch.api.train",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used (PEP 562)."""
    if name == "__version__":
        value: Any = importlib.import_module("regrow.launch.run.versions").own_version()
    elif name in _MODULES:
        value = getattr(importlib.import_module(_MODULES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
