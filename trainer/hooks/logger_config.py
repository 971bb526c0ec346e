"""Schemas of the loggers beside Weights & Biases: a section of the root config and a hook for each."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from omegaconf import II

from regrow.trainer.config import HookConfig, HookStage

__all__ = [
    "CsvConfig",
    "CsvHookConfig",
    "MlflowConfig",
    "MlflowHookConfig",
    "TensorBoardConfig",
    "TensorBoardHookConfig",
    "TrackioConfig",
    "TrackioHookConfig",
]

# The sections of the root config, wherever the hooks stand.
_TENSORBOARD_SECTION: Any = II("tensorboard")
_CSV_SECTION: Any = II("csv")
_MLFLOW_SECTION: Any = II("mlflow")
_TRACKIO_SECTION: Any = II("trackio")


@dataclass(kw_only=True, slots=True)
class TensorBoardConfig:
    """TensorBoard's event files, with `logger=tensorboard`.

    Attributes:
        folder: receives a folder per run; null writes to `tensorboard` in the run's directory.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("tensorboard", "tensorboard_schema")

    folder: str | None = None


@dataclass(kw_only=True, slots=True)
class CsvConfig:
    """A table of all steps, with `logger=csv`.

    Attributes:
        folder: receives a file per run; null writes `metrics.csv` into the run's directory.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("csv", "csv_schema")

    folder: str | None = None


@dataclass(kw_only=True, slots=True)
class MlflowConfig:
    """MLflow, with `logger=mlflow`.

    Attributes:
        tracking_uri: a server or a database, as MLflow has it; null is the SQLite file `mlflow.db` in `run.root`.
        experiment: MLflow's experiment, made where it is not there.
        tags: further tags of the run.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("mlflow", "mlflow_schema")

    tracking_uri: str | None = None
    experiment: str = "regrow"
    tags: dict[str, str] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class TrackioConfig:
    """Trackio, with `logger=trackio`; `trackio show` opens it, and `trackio sync` sends it elsewhere.

    Attributes:
        project: Trackio's project.
        group: runs shown together; null is the sweep's name in a sweep.
        folder: Trackio's own folder, its TRACKIO_DIR; null is `trackio` in `run.root`.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("trackio", "trackio_schema")

    project: str = "regrow"
    group: str | None = None
    folder: str | None = None


@dataclass(kw_only=True, slots=True)
class TensorBoardHookConfig(HookConfig):
    """TensorBoard, with `logger=tensorboard`.

    Attributes:
        settings: the section `tensorboard`.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("hook", "tensorboard_hook_schema")
    _target_: str = "regrow.trainer.hooks.tensorboard.TensorBoardHook"
    stage: HookStage = HookStage.log
    settings: TensorBoardConfig = _TENSORBOARD_SECTION


@dataclass(kw_only=True, slots=True)
class CsvHookConfig(HookConfig):
    """A table, with `logger=csv`.

    Attributes:
        settings: the section `csv`.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("hook", "csv_hook_schema")
    _target_: str = "regrow.trainer.hooks.csv.CsvHook"
    stage: HookStage = HookStage.log
    settings: CsvConfig = _CSV_SECTION


@dataclass(kw_only=True, slots=True)
class MlflowHookConfig(HookConfig):
    """MLflow, with `logger=mlflow`.

    Attributes:
        settings: the section `mlflow`.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("hook", "mlflow_hook_schema")
    _target_: str = "regrow.trainer.hooks.mlflow.MlflowHook"
    stage: HookStage = HookStage.log
    settings: MlflowConfig = _MLFLOW_SECTION


@dataclass(kw_only=True, slots=True)
class TrackioHookConfig(HookConfig):
    """Trackio, with `logger=trackio`.

    Attributes:
        settings: the section `trackio`.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("hook", "trackio_hook_schema")
    _target_: str = "regrow.trainer.hooks.trackio.TrackioHook"
    stage: HookStage = HookStage.log
    settings: TrackioConfig = _TRACKIO_SECTION
