"""What torchtitan wants beside the tensors, so that a step of ours is one that it resumes from."""

from collections.abc import Iterable, Mapping
from typing import Any

from regrow.checkpoint.format.manifest import Manifest, read_manifest
from regrow.checkpoint.load.initial_load import pin_source
from regrow.checkpoint.load.loading import is_verified
from regrow.checkpoint.storage.base import Storage
from regrow.launch.commands.identify_model import section_of_run
from regrow.trainer.config import AdamWConfig

__all__ = ["adamw_of", "beside_tensors", "manifest_of", "step_of"]


def step_of(place: Storage) -> Storage | None:
    """The step of ours that a path is; None for anything else."""
    step = pin_source(place)
    return step if is_verified(step) else None


def manifest_of(place: Storage) -> Manifest | None:
    """Of that step."""
    step = step_of(place)
    return read_manifest(step) if step is not None else None


def adamw_of(place: Storage) -> AdamWConfig:
    """The optimizer's settings by the run's config that a step lies below; the defaults where there is none."""
    step = step_of(place)
    given = section_of_run(step, "optimizer") if step is not None else {}
    names = ("lr", "weight_decay", "beta1", "beta2", "eps")
    values: dict[str, Any] = {n: float(given[n]) for n in names if isinstance(given.get(n), int | float)}
    return AdamWConfig(**values)


def beside_tensors(
    names: Iterable[str], step: int, train_state: Mapping[str, Any], adamw: AdamWConfig
) -> dict[str, Any]:
    """Objects by flat name: the optimizer's settings of each parameter, and the counters.

    Args:
        names: of the tensors, the optimizer's among them.
        step: at which they were saved.
        train_state: ours.
        adamw: the optimizer's settings.
    """
    # Every field that torch's AdamW has had; a reader takes those that its own has.
    group = {
        "lr": adamw.lr,
        "initial_lr": adamw.lr,
        "betas": (adamw.beta1, adamw.beta2),
        "eps": adamw.eps,
        "weight_decay": adamw.weight_decay,
        "amsgrad": False,
        "foreach": False,
        "maximize": False,
        "capturable": False,
        "differentiable": False,
        "fused": True,
        "decoupled_weight_decay": True,
    }
    prefix, suffix = "optimizer.state.", ".exp_avg"
    parameters = [n[len(prefix) : -len(suffix)] for n in names if n.startswith(prefix) and n.endswith(suffix)]
    settings = {f"optimizer.param_groups.{p}.{field}": value for p in parameters for field, value in group.items()}
    counters = {
        "train_state.step": step,
        "train_state.ntokens_seen": int(train_state.get("tokens", 0)),
        "lr_scheduler.last_epoch": step,
    }
    return {**settings, **counters}
