"""MLflow. The only file that imports it."""

import fcntl
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from regrow.trainer.hooks.logger import LoggedRun, LoggerHook, RunEnd, Store, measured
from regrow.trainer.hooks.logger_config import MlflowConfig, MlflowHookConfig
from regrow.trainer.hooks.user_project import read_user_project

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

__all__ = ["MlflowHook"]

# Marks the run as ours, at every start the same.
_KEY = "regrow.run_id"
# MLflow's own limits for one request and for one value.
_METRICS, _PARAMS, _PARAM_LENGTH = 1000, 100, 6000
_STATUS = {"finished": "FINISHED", "failed": "FAILED"}


@final
class MlflowHook(LoggerHook):
    """See `MlflowConfig`. A lineage that goes back is a run below the run."""

    NAME = "mlflow"
    TITLE = "MLflow"
    PACKAGES = ("mlflow", "sqlalchemy", "alembic")

    def __init__(self, config: MlflowHookConfig) -> None:
        super().__init__()
        self._config = config.settings

    def open_store(self, run: LoggedRun) -> Store:
        """The run in the experiment."""
        # Nothing is sent anywhere, but to the tracking server.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        return _MlflowRun(self._config, run)


@final
class _MlflowRun(Store):
    """A run of MLflow's; the store knows it by a tag."""

    def __init__(self, config: MlflowConfig, run: LoggedRun) -> None:
        from mlflow import MlflowClient

        uri = config.tracking_uri
        with _alone(run.run_dir.parent / "mlflow.db") if uri is None else _beside_others() as file:
            self._client = MlflowClient(uri or f"sqlite:///{file}")
            experiment = _experiment(self._client, config.experiment)
            found = _find(self._client, experiment, run.key)
            if found is None:
                parent = _find(self._client, experiment, run.run_id) if run.line.branch else None
                tags = _tags(run, None if parent is None else parent.info.run_id) | config.tags
                found = self._client.create_run(experiment.experiment_id, tags=tags, run_name=run.name)
        self._id = found.info.run_id
        self._client.update_run(self._id, status="RUNNING")
        self._add_params(run, found)

    def _add_params(self, run: LoggedRun, found: "Run") -> None:
        """The config; MLflow lets none of it change, so that what the run began with stays."""
        from mlflow.entities import Param

        new = [Param(k, v) for k, v in _flat(run.config).items() if k not in found.data.params]
        for start in range(0, len(new), _PARAMS):
            self._client.log_batch(self._id, params=new[start : start + _PARAMS])

    def last_step(self) -> int:
        return max((metric.step for metric in self._client.get_metric_history(self._id, "loss")), default=0)

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        from mlflow.entities import Metric

        waiting: list[Metric] = []
        now = int(time.time() * 1000)
        for row in rows:
            metrics = [Metric(name, value, now, row["step"]) for name, value in measured(row).items()]
            if len(waiting) + len(metrics) > _METRICS:
                self._client.log_batch(self._id, metrics=waiting)
                waiting = []
            waiting += metrics
        self._client.log_batch(self._id, metrics=waiting)

    def close(self, end: RunEnd | None) -> None:
        if end is not None:
            self._client.set_terminated(self._id, _STATUS.get(end.kind, "KILLED"))


def _experiment(client: "MlflowClient", name: str) -> "Experiment":
    """The experiment, made where it is not there."""
    return client.get_experiment_by_name(name) or client.get_experiment(client.create_experiment(name))


def _find(client: "MlflowClient", experiment: "Experiment", key: str) -> "Run | None":
    """The run with our mark."""
    found = client.search_runs([experiment.experiment_id], filter_string=f"tags.`{_KEY}` = '{key}'", max_results=1)
    return found[0] if found else None


def _tags(run: LoggedRun, parent: str | None) -> dict[str, str]:
    """MLflow's own tags, and ours."""
    tags = {_KEY: run.key, "regrow.lineage": run.line.lineage, "mlflow.source.name": "regrow"}
    if parent is not None:
        tags["mlflow.parentRunId"] = parent
    if run.sweep is not None:
        tags["regrow.sweep"] = run.sweep
    project = read_user_project(Path.cwd(), 0)
    if project is not None:
        tags["mlflow.source.git.commit"] = project.revision
    return tags


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Sections as dotted names, with what MLflow takes for values."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)[:_PARAM_LENGTH]
    return flat


@contextmanager
def _alone(file: Path) -> Iterator[Path]:
    """Runs that start at the same time make the tables of the database one after the other."""
    with file.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield file


@contextmanager
def _beside_others() -> Iterator[None]:
    """A server sees to that itself."""
    yield None
