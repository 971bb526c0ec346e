"""The root schema, and how the schemas of all packages get into Hydra's ConfigStore."""

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

import regrow.checkpoint
import regrow.models
import regrow.trainer
from regrow.checkpoint.config import CheckpointConfig
from regrow.checkpoint.policy.lineage import Resume
from regrow.models.config import ModelConfig
from regrow.trainer.config import (
    HookConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    SchedulerConfig,
    TrainConfig,
    WandbConfig,
)
from regrow.trainer.data.config import DataConfig
from regrow.trainer.hooks.logger_config import CsvConfig, MlflowConfig, TensorBoardConfig, TrackioConfig
from regrow.trainer.plan.config import PlanConfig
from regrow.trainer.run_record import Extend

__all__ = ["Config", "Device", "Kernels", "LaunchConfig", "Mode", "RunConfig", "register_schemas", "schema_classes"]


class Mode(Enum):
    """What the command does.

    Attributes:
        train: trains, or goes on training.
        plan: says what a run would need, and starts none.
    """

    train = "train"
    plan = "plan"


class Device(Enum):
    """Where ranks compute.

    Attributes:
        auto: on GPUs where there are some, else on CPUs.
        cpu: on CPUs.
        cuda: on GPUs.
    """

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Kernels(Enum):
    """What CPUs compute with.

    Attributes:
        auto: what was measured to be fastest here, which the run then keeps to.
        plain: torch's operators everywhere.
    """

    auto = "auto"
    plain = "plain"


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """Where a run lives and how it goes on.

    Attributes:
        root: the folder that holds runs.
        name: the run's folder below `root`; by default the model's name and a hash of what makes the run
            what it is, so that the same command finds it again. In a sweep, its overrides.
        resume: whether the run goes on from what its directory holds.
        rewind: apply load options again that were applied before.
        extend: what to do where `train.steps` goes beyond the end of the learning-rate schedule that the run
            began with. Acts once.
        allow_change: hyperparameters that may differ from the stored ones, by name or section.
    """

    root: str = "outputs"
    name: str = MISSING
    resume: Resume = Resume.auto
    rewind: bool = False
    extend: Extend = Extend.refuse
    allow_change: list[str] = field(default_factory=list)


@dataclass(kw_only=True, slots=True)
class LaunchConfig:
    """How ranks are started.

    Attributes:
        device: where ranks compute.
        max_restarts: times that all ranks are started again, here, after one died; 0 ends the run.
        threads_per_rank: CPU threads; 0 takes OMP_NUM_THREADS where that is set, else shares the cores. Results
            are bitwise the same only with the same number.
        kernels: on CPUs, whether kernels are used that are faster than torch's operators here by a tenth.
        timeout_s: seconds after which a collective that hangs is an error.
        elastic: with `parallel.dp_shard=-1` under Slurm, the numbers of ranks that a run may go on with; empty keeps
            to the one that it began with.
    """

    device: Device = Device.auto
    max_restarts: int = 0
    threads_per_rank: int = 0
    kernels: Kernels = Kernels.auto
    timeout_s: float = 600.0
    elastic: list[int] = field(default_factory=list)


@dataclass(kw_only=True, slots=True)
class Config:
    """Everything; one section per concern.

    Attributes:
        model: the model's dimensions.
        parallel: over how many ranks a run is spread, and how.
        checkpoint: when to save, what, which steps to keep, and what to start from.
        data: what is trained on, and how it becomes batches.
        optimizer: the optimizer's settings.
        scheduler: the learning rate over the steps.
        precision: the types that are computed and kept in.
        train: the loop: steps, clipping, recomputation, compilation.
        run: where a run lives and how it goes on.
        launch: how ranks are started.
        logger: the choice of the group `logger`, the last of several; each adds what sends metrics elsewhere.
        wandb: Weights & Biases, with `logger=wandb`.
        tensorboard: TensorBoard's event files, with `logger=tensorboard`.
        csv: a table of all steps, with `logger=csv`.
        mlflow: MLflow, with `logger=mlflow`.
        trackio: Trackio, with `logger=trackio`.
        hooks: parts of the loop, by name.
        mode: what the command does.
        plan: what `mode=plan` assumes of the machine, and how it answers.
        seed: seed of the first weights, the order of data, and dropout; another seed is another run.
    """

    model: ModelConfig = MISSING
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    data: DataConfig = MISSING
    optimizer: OptimizerConfig = MISSING
    scheduler: SchedulerConfig = MISSING
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    logger: str = "jsonl"
    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: TensorBoardConfig = field(default_factory=TensorBoardConfig)
    csv: CsvConfig = field(default_factory=CsvConfig)
    mlflow: MlflowConfig = field(default_factory=MlflowConfig)
    trackio: TrackioConfig = field(default_factory=TrackioConfig)
    hooks: dict[str, HookConfig] = field(default_factory=dict)
    mode: Mode = Mode.train
    plan: PlanConfig = field(default_factory=PlanConfig)
    seed: int = 0


def config_modules(package: ModuleType) -> list[ModuleType]:
    """The modules named `config` or `…_config` below a package; importing them needs no torch."""
    return [
        importlib.import_module(name) for path in package.__path__ for name in _config_names(path, package.__name__)
    ]


def _config_names(folder: str, package: str) -> Iterator[str]:
    """By the files alone: `pkgutil.walk_packages` would import every package on the way, and torch with some."""
    for module in pkgutil.iter_modules([folder], f"{package}."):
        if module.ispkg:
            yield from _config_names(f"{folder}/{module.name.rpartition('.')[2]}", module.name)
        elif module.name.endswith((".config", "_config")):
            yield module.name


@functools.cache
def schema_classes() -> dict[tuple[str, str], type[Any]]:
    """Every dataclass of Regrow's with a `SCHEMA`, by (group, name), but those of launchers."""
    found: dict[tuple[str, str], type[Any]] = {}
    for package in (regrow.models, regrow.checkpoint, regrow.trainer):
        for module in config_modules(package):
            for node in vars(module).values():
                if isinstance(node, type) and dataclasses.is_dataclass(node) and "SCHEMA" in vars(node):
                    found[node.SCHEMA] = node  # type: ignore[attr-defined]
    return found


@functools.cache
def register_schemas() -> None:
    """Stores the root schema and all others; once in a process."""
    store = ConfigStore.instance()
    store.store(name="config_schema", node=Config)
    for (group, name), node in schema_classes().items():
        store.store(group=group, name=name, node=node)
