"""Norms of gradients, weights and activations by module, right under every layout, without waiting for the device."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from regrow.errors import ConfigError
from regrow.torch_compat import StridedShard, is_in_backward
from regrow.trainer.hook import Hook
from regrow.trainer.hooks.statistics_config import Grouping, StatisticsConfig
from regrow.trainer.jsonlines import StepLog
from regrow.trainer.loop import Trainer
from regrow.trainer.measures import Arriving, Measures
from regrow.trainer.parallel.context import ParallelContext
from regrow.trainer.run_files import STATISTICS

__all__ = ["StatisticsHook"]

_BLOCK = re.compile(r"(.*?\.\d+)\.")


def _group(name: str, by: Grouping) -> str:
    """Where a parameter belongs: `layers.3.attention.wq.weight` to `layers.3`, `norm.weight` to `norm`."""
    if by is Grouping.parameter:
        return name
    match = _BLOCK.match(name)
    return match[1] if match else name.rpartition(".")[0] or name


def _is_first(parameter: Tensor, context: ParallelContext, owners: list[int] | None) -> bool:
    """Whether this rank's share of a parameter is to be added: each share of it once, over all ranks.

    Args:
        parameter: this rank's.
        context: its place.
        owners: the ranks that hold it, where not all do.
    """
    stage = owners if owners is not None else context.stage_ranks(context.coordinate("pp"))
    if context.rank not in stage:
        return False
    if not isinstance(parameter, DTensor):
        return context.rank == stage[0]
    mesh, place = parameter.device_mesh, parameter.device_mesh.get_coordinate()
    assert place is not None, "a rank holds what it has a share of"
    # The ranks that hold this copy's shares: of all copies, the one that the stage's first rank has a share of.
    whole = tuple(
        slice(None) if isinstance(kind, Shard | StridedShard) else at
        for kind, at in zip(parameter.placements, place, strict=True)
    )
    return stage[0] in mesh.mesh[whole].reshape(-1).tolist()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass(kw_only=True, slots=True)
class _Model:
    """What is measured, found once.

    Attributes:
        parameters: this rank's, with the group that each belongs to and whether it is added here.
        blocks: this rank's, by name.
        names: of all ranks' groups.
        block_names: of all ranks' blocks.
        acts: whether this rank's activations are added.
    """

    parameters: list[tuple[str, nn.Parameter, bool]]
    blocks: dict[str, nn.Module]
    names: list[str]
    block_names: list[str]
    acts: bool


@final
class StatisticsHook(Hook):
    """See `StatisticsConfig`. Two small reductions at the steps that are measured, nothing at the others."""

    def __init__(self, config: StatisticsConfig) -> None:
        if config.every < 1:
            raise ConfigError(f"hooks.statistics.every must be at least 1, but is {config.every}; use 100")
        self._config = config
        self._model: _Model | None = None
        self._hooks: list[Any] = []
        self._measured: dict[str, Measures] = {}
        self._arriving: dict[int, dict[str, Arriving]] = {}
        self._log: StepLog | None = None

    def before_fit(self, trainer: Trainer) -> None:
        self._model = model = self._look_at(trainer)
        if trainer.context.is_main:
            self._log = StepLog(trainer.resources.run_dir / STATISTICS, trainer.state.step)
        if self._config.in_metrics:
            for kind, names in self._kinds(model).items():
                for name in names:
                    read = partial(self._norm, kind, name, trainer.context.device)
                    trainer.reduction.carry(f"{kind}_norm/{name}", read, initial=math.nan, in_row=True)

    def _kinds(self, model: _Model) -> dict[str, list[str]]:
        """What is measured, and its names."""
        config = self._config
        kinds = {"gradient": config.gradients, "weight": config.weights, "activation": config.activations}
        return {kind: model.block_names if kind == "activation" else model.names for kind, on in kinds.items() if on}

    def _look_at(self, trainer: Trainer) -> _Model:
        context, by = trainer.context, self._config.by
        own = dict(trainer.model.named_parameters())
        owners = trainer.engine.owner_ranks(list(own))
        blocks = trainer.model.blocks()
        named = {name: module for name, module in trainer.model.named_modules() if module in blocks}
        groups = sorted({_group(n, by) for n in trainer.engine.names}, key=_natural)
        in_blocks = {match[1] for n in trainer.engine.names if (match := _BLOCK.match(n))}
        cut = bool(trainer.resources.config["parallel"]["sequence_parallel"])
        return _Model(
            parameters=[(_group(n, by), p, _is_first(p, context, owners.get(n))) for n, p in own.items()],
            blocks=named,
            names=groups,
            block_names=sorted(in_blocks, key=_natural),
            # Ranks that share matrices have the same activations, unless these are cut along the sequence.
            acts=cut or context.coordinate("tp") == 0,
        )

    def _norm(self, kind: str, name: str, device: torch.device) -> Tensor:
        if kind in self._measured:
            return self._measured[kind].norm(name)
        return torch.full((), math.nan, dtype=torch.float64, device=device)

    def before_step(self, trainer: Trainer) -> None:
        step = trainer.state.step + 1
        self._measured = {}
        if self._model is None or not (step == 1 or step % self._config.every == 0):
            return
        device = trainer.context.device
        self._measured = {kind: Measures(names, device) for kind, names in self._kinds(self._model).items()}
        if "activation" in self._measured:
            for name, block in self._model.blocks.items():
                self._hooks.append(block.register_forward_hook(self._watch(name, counts=self._model.acts)))

    def _watch(self, name: str, *, counts: bool) -> Callable[[nn.Module, Any, Any], None]:
        measures = self._measured["activation"]

        def add(_module: nn.Module, _given: Any, out: Any) -> None:
            # What is computed again for the backward pass has been seen.
            if isinstance(out, Tensor) and not is_in_backward():
                measures.add(name, _local(out), counts=counts)

        return add

    def before_optimizer_step(self, trainer: Trainer) -> None:
        self._unhook()
        if not self._measured:
            return
        assert self._model is not None
        for name, parameter, counts in self._model.parameters:
            if "gradient" in self._measured and parameter.grad is not None:
                self._measured["gradient"].add(name, _local(parameter.grad), counts=counts)
            if "weight" in self._measured:
                self._measured["weight"].add(name, _local(parameter), counts=counts)
        for measures in self._measured.values():
            measures.reduce(trainer.context.world_size)
        if self._log is not None:
            self._arriving[trainer.state.step + 1] = {k: m.send() for k, m in self._measured.items()}

    def after_metrics(self, trainer: Trainer, row: Mapping[str, Any]) -> None:
        # Sent before the row was, they have arrived with it.
        arriving = self._arriving.pop(row["step"], None)
        if arriving is not None and self._log is not None:
            self._log.append({"step": row["step"], **{kind: sent.rows() for kind, sent in arriving.items()}})

    def before_commit(self, trainer: Trainer, step: int) -> None:
        if self._log is not None:
            self._log.make_durable()

    def _unhook(self) -> None:
        for handle in self._hooks:
            handle.remove()
        self._hooks.clear()

    def close(self, trainer: Trainer) -> None:
        self._unhook()
        if self._log is not None:
            self._log.close()


def _natural(name: str) -> list[tuple[int, str]]:
    """`layers.2` before `layers.10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
