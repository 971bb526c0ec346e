"""Whole runs on ranks from the pool: what the command does, without starting an interpreter per rank."""

import dataclasses
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from regrow.launch.run import rank
from regrow.launch.run.compose import compose_trainer
from regrow.launch.run.prepare import prepare_run
from regrow.launch.run.rank import run_rank
from regrow.launch.run.rank_spec import RankSpec
from regrow.launch.run.signals import StopFlag
from regrow.launch.run.start import open_spec
from regrow.trainer.hook import Hook
from regrow.trainer.loop import Trainer
from regrow.trainer.parallel.context import close_parallel, open_parallel
from tests.composing import compose_config
from tests.pool import run_distributed


@dataclass(frozen=True)
class Result:
    """How a run ended on rank 0."""

    kind: str
    step: int
    message: str


def spec_of(overrides: Sequence[str], run_dir: Path, world_size: int, device: str = "cpu") -> RankSpec:
    """What the launcher would tell its ranks."""
    config = compose_config([*overrides, f"launch.device={device}"])
    return prepare_run(config, run_dir, overrides=overrides, world_size=world_size)


def train(
    overrides: Sequence[str], run_dir: Path, world_size: int = 1, device: str = "cpu", timeout_s: float = 240.0
) -> Result:
    """Opens the run and trains it on pool ranks, as `regrow` would."""
    run_dir.mkdir(parents=True, exist_ok=True)
    spec = spec_of(overrides, run_dir, world_size, device)
    opened = open_spec(spec)
    if opened.reached is not None:
        return Result("finished", spec.config.train.steps, "")
    spec = dataclasses.replace(spec, record=opened.record)
    outcomes = run_distributed(_train_rank, spec, world_size=world_size, timeout_s=timeout_s)
    return Result(outcomes[0].kind, outcomes[0].step, outcomes[0].message)


def train_until_killed(
    overrides: Sequence[str], run_dir: Path, world_size: int, event: str, step: int, timeout_s: float = 240.0
) -> None:
    """As `train`, but all ranks are killed (SIGKILL).

    Args:
        overrides: of the run.
        run_dir: its folder.
        world_size: ranks.
        event: of hooks, in which they are.
        step: the first at which they are.
        timeout_s: for all.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    spec = spec_of(overrides, run_dir, world_size)
    spec = dataclasses.replace(spec, record=open_spec(spec).record)
    with pytest.raises(AssertionError) as died:
        run_distributed(_kill_rank, spec, event, step, world_size=world_size, timeout_s=timeout_s)
    ends = [line for line in str(died.value).splitlines() if line.startswith("rank ")]
    assert ends == [f"rank {r}: died without an answer, exit code -9" for r in range(world_size)]


def _kill_rank(spec: RankSpec, event: str, step: int) -> Any:
    def die(_hook: Hook, trainer: Trainer, *_rest: Any) -> None:
        if trainer.state.step >= step:
            os.kill(os.getpid(), signal.SIGKILL)

    def composed(*arguments: Any) -> Trainer:
        trainer = compose_trainer(*arguments)
        trainer.hooks.append(type("Killer", (Hook,), {event: die})())
        return trainer

    vars(rank)["compose_trainer"] = composed
    return run_rank(spec, StopFlag())


def _train_rank(spec: RankSpec) -> Any:
    return run_rank(spec, StopFlag())


def first_weights(overrides: Sequence[str], run_dir: Path, world_size: int) -> dict[str, torch.Tensor]:
    """The whole model's starting weights under a layout."""
    run_dir.mkdir(parents=True, exist_ok=True)
    spec = spec_of(overrides, run_dir, world_size)
    spec = dataclasses.replace(spec, record=open_spec(spec).record)
    results: list[dict[str, torch.Tensor]] = run_distributed(_weights_of, spec, world_size=world_size)
    return results[0]


def _weights_of(spec: RankSpec) -> dict[str, torch.Tensor]:
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    context = open_parallel(spec.layout, "cpu", 30.0)
    model = compose_trainer(spec, context, StopFlag(), 1).model
    whole = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        whole[name] = tensor.detach().clone()
    dist.barrier()
    close_parallel()
    assert os.environ["RANK"]
    return whole
