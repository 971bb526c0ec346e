"""The optimizer, on each rank's own shards.

AdamW is elementwise, so it runs on the local tensors behind DTensors: no dispatch per tensor, and parameters
of different meshes can share one fused call. State is named by parameter, never by position.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim.adamw import adamw

from regrow.errors import ConfigError
from regrow.models.base import LanguageModel
from regrow.torch_compat import StridedShard, foreach_divide, foreach_norm, hosted_like
from regrow.trainer.config import AdamWConfig
from regrow.trainer.device import is_accelerator
from regrow.trainer.offload import HostState, Piece
from regrow.trainer.rounded_adamw import RoundedAdamW
from regrow.trainer.shards import like_parameter as _like
from regrow.trainer.shards import local_part as _local

__all__ = ["AdamW", "Optimizer", "RoundingOptimizer", "global_grad_norm"]


class Optimizer(ABC):
    """Updates a model's parameters in place from their gradients. Made from its config and the model.

    Attributes:
        OFFLOADS: whether the class takes `offload=True` too, which keeps its state in the host's memory.
    """

    OFFLOADS: ClassVar[bool] = False

    @staticmethod  # noqa: B027 (an optimizer may have nothing to check)
    def check(config: Any) -> None:
        """Looks at the config before there is a model; raises a ValueError where a field is out of its range.

        Args:
            config: the section `optimizer`.
        """

    @abstractmethod
    def step(self, lr: float, grad_scale: Tensor, skip: Tensor) -> None:
        """One update.

        Args:
            lr: the learning rate of this step.
            grad_scale: float64 scalar on the device; gradients are divided by it (clipping).
            skip: scalar on the device; 1 leaves everything as it is, without the host looking.
        """

    @abstractmethod
    def zero_grad(self) -> None:
        """Forgets the gradients."""

    @abstractmethod
    def reset(self) -> None:
        """Forgets, in place, what was learnt: the state is that of a new optimizer."""

    @abstractmethod
    def state_tensors(self) -> dict[str, Tensor]:
        """The state to save and load in place, by `state.<parameter>.<part>`."""


class RoundingOptimizer(Optimizer):
    """Updates bfloat16 parameters without losing what is small, as `precision=bf16_params` asks."""

    @abstractmethod
    def round_stochastically(self, seed: int) -> None:
        """Called before the first step with `precision=bf16_params`, and not otherwise.

        Args:
            seed: the run's, of which every random bit must be a function, with the step and the element's place.
        """


def _rows(tensor: Tensor, piece: Piece) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])[piece.rows]


class _Update(NamedTuple):
    """What a step changes: a parameter of this rank's, or rows of it."""

    name: str
    rows: slice
    parameter: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor


@final
class AdamW(RoundingOptimizer):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) with torch's fused kernel, or rounding stochastically.

    Args:
        config: see `AdamWConfig`.
        model: its parameters must have their memory already.
        offload: keep the moments in the host's memory.
    """

    OFFLOADS = True

    def __init__(self, config: AdamWConfig, model: LanguageModel, *, offload: bool = False) -> None:
        self.check(config)
        self.config = config
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._decayed = {n: model.decays(n) for n in self._parameters}
        self._rounded: RoundedAdamW | None = None
        with torch.no_grad():
            local = {n: _local(p.detach()) for n, p in self._parameters.items()}
            self._host = HostState(local, ("exp_avg", "exp_avg_sq")) if offload else None
            self._exp_avg, self._exp_avg_sq = (
                ({n: torch.zeros_like(p) for n, p in local.items()} for _ in range(2))
                if self._host is None
                else (self._host.tensors["exp_avg"], self._host.tensors["exp_avg_sq"])
            )
            self._steps = {
                n: torch.zeros((), dtype=torch.float32, device=p.device) for n, p in self._parameters.items()
            }

    @staticmethod
    def check(config: AdamWConfig) -> None:
        """Raises ConfigError where a field is out of its range."""
        rules = {
            "lr": (config.lr >= 0, "at least 0", "3e-4"),
            "weight_decay": (config.weight_decay >= 0, "at least 0", "0.1"),
            "beta1": (0 <= config.beta1 < 1, "within 0 and 1 (1 excluded)", "0.9"),
            "beta2": (0 <= config.beta2 < 1, "within 0 and 1 (1 excluded)", "0.95"),
            "eps": (config.eps > 0, "above 0", "1e-8"),
        }
        for name, (holds, rule, remedy) in rules.items():
            if not holds:
                raise ConfigError(f"optimizer.{name} must be {rule}, but is {getattr(config, name)}; use {remedy}")

    def round_stochastically(self, seed: int) -> None:
        self._rounded = RoundedAdamW(self.config, self._parameters, seed)

    @torch.no_grad()
    def step(self, lr: float, grad_scale: Tensor, skip: Tensor) -> None:
        local = {n: (_local(p), _local(p.grad)) for n, p in self._parameters.items() if p.grad is not None}
        if self._host is None:
            whole = slice(None)
            updates = [
                _Update(n, whole, p, g, self._exp_avg[n], self._exp_avg_sq[n], self._steps[n])
                for n, (p, g) in local.items()
            ]
            self._step_all(updates, lr, grad_scale, skip)
            return

        def update(pieces: Sequence[Piece], moments: Mapping[str, Mapping[str, Tensor]]) -> None:
            group = [
                _Update(
                    piece.name,
                    piece.rows,
                    _rows(local[piece.name][0], piece),
                    _rows(local[piece.name][1], piece),
                    moments["exp_avg"][piece.name],
                    moments["exp_avg_sq"][piece.name],
                    # Counted once, with the parameter's last rows.
                    self._steps[piece.name] if piece.last else self._steps[piece.name].clone(),
                )
                for piece in pieces
                if piece.name in local and piece.size
            ]
            self._step_all(group, lr, grad_scale, skip)

        self._host.update(update)

    def _step_all(self, updates: list[_Update], lr: float, grad_scale: Tensor, skip: Tensor) -> None:
        for decayed in (True, False):
            group = [u for u in updates if self._decayed[u.name] is decayed]
            if group:
                self._step_group(group, lr, self.config.weight_decay if decayed else 0.0, grad_scale, skip)

    def _step_group(
        self, group: list[_Update], lr: float, weight_decay: float, grad_scale: Tensor, skip: Tensor
    ) -> None:
        if self._rounded is not None:
            own = [(u.parameter, u.exp_avg, u.exp_avg_sq, u.grad) for u in group]
            self._rounded.step(
                [u.name for u in group],
                own,
                [u.step for u in group],
                lr=lr,
                weight_decay=weight_decay,
                grad_scale=grad_scale,
                skip=skip,
            )
            return
        if group[0].grad.dtype == torch.float64:
            # The fused kernel's scale is float32, which float64 gradients would notice.
            foreach_divide([u.grad for u in group], grad_scale)
            grad_scale = torch.ones_like(grad_scale)
        adamw(
            [u.parameter for u in group],
            [u.grad for u in group],
            [u.exp_avg for u in group],
            [u.exp_avg_sq for u in group],
            [],
            [u.step for u in group],
            fused=True,
            grad_scale=grad_scale.to(torch.float32),
            found_inf=skip,
            amsgrad=False,
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            lr=lr,
            weight_decay=weight_decay,
            eps=self.config.eps,
            maximize=False,
        )

    def zero_grad(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def reset(self) -> None:
        if self._host is not None:
            self._host.wait()
        for tensors in (self._exp_avg, self._exp_avg_sq, self._steps):
            for tensor in tensors.values():
                tensor.zero_()

    def state_tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        like: Callable[[Tensor, nn.Parameter], Tensor] = _like
        if self._host is not None:
            self._host.wait()
            like = hosted_like
        for name, parameter in self._parameters.items():
            tensors[f"state.{name}.exp_avg"] = like(self._exp_avg[name], parameter)
            tensors[f"state.{name}.exp_avg_sq"] = like(self._exp_avg_sq[name], parameter)
            tensors[f"state.{name}.step"] = self._steps[name]
        return tensors


# Elements that are float64 at a time on a CPU, for each thread: the copy stays in its cache.
_WIDE_ELEMENTS = 1 << 15


def _sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """Over all elements of all tensors, summed in float64, where no square is lost or infinite; a float64 scalar.

    float32 sums of large matrices are off by parts in a thousand, and by others for other shards. No tensor is copied
    whole; on a GPU all of them take a few launches.
    """
    if is_accelerator(tensors[0].device):
        # Tensors of one dtype together: a list of several takes a launch for each tensor.
        alike: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            alike.setdefault(tensor.dtype, []).append(tensor)
        norms = [norm for same in alike.values() for norm in foreach_norm(same, 2, dtype=torch.float64)]
        return torch.stack(norms).square().sum()
    wide = torch.empty(_WIDE_ELEMENTS * torch.get_num_threads(), dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for tensor in tensors:
        # torch's own norm with a float64 result takes four times as long.
        for part in torch.split(tensor.reshape(-1), len(wide)):
            squared = wide[: len(part)].copy_(part)
            total += torch.dot(squared, squared)
    return total


@torch.no_grad()
def global_grad_norm(parameters: Sequence[nn.Parameter], stages: dist.ProcessGroup | None = None) -> Tensor:
    """The L2 norm of all gradients over all ranks, a float64 scalar on the device; exact to float64's rounding.

    Shards are summed over the axes that they are sharded on, replicas counted once.

    Args:
        parameters: this rank's, each of which it has a share of.
        stages: the ranks that hold the other stages of a pipeline.
    """
    groups: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is None:
            continue
        axes: tuple[dist.ProcessGroup, ...] = ()
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            axes = tuple(
                mesh.get_group(i)
                for i, placement in enumerate(parameter.placements)
                if isinstance(placement, Shard | StridedShard) and mesh.size(i) > 1
            )
        groups.setdefault(axes, []).append(_local(parameter.grad))
    totals = []
    for axes, grads in groups.items():
        total = _sum_of_squares(grads)
        for group in axes:
            dist.all_reduce(total, group=group)
        totals.append(total)
    whole = torch.stack(totals).sum()
    if stages is not None:
        dist.all_reduce(whole, group=stages)
    return whole.sqrt()
