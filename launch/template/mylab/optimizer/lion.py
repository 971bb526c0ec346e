"""Lion, on each rank's own shards: every operation is elementwise, so a shard needs nothing of the others."""

from typing import final

import torch
from torch import Tensor

from regrow.launch.template.mylab.optimizer.config import LionConfig
from regrow.models.base import LanguageModel
from regrow.trainer.optimizer import Optimizer
from regrow.trainer.shards import like_parameter, local_part

__all__ = ["Lion"]


@final
class Lion(Optimizer):
    """Evolved sign momentum (Chen et al. 2023, arXiv:2302.06675, algorithm 2).

    Args:
        config: see `LionConfig`.
        model: its parameters must have their memory already.
    """

    def __init__(self, config: LionConfig, model: LanguageModel) -> None:
        self.check(config)
        self._config = config
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._decay = {n: config.weight_decay if model.decays(n) else 0.0 for n in self._parameters}
        with torch.no_grad():
            self._momentum = {n: torch.zeros_like(local_part(p)) for n, p in self._parameters.items()}

    @staticmethod
    def check(config: LionConfig) -> None:
        """Raises ValueError where a field is out of its range."""
        rules = {
            "lr": (config.lr >= 0, "at least 0", "1e-4"),
            "weight_decay": (config.weight_decay >= 0, "at least 0", "0.1"),
            "beta1": (0 <= config.beta1 < 1, "within 0 and 1 (1 excluded)", "0.9"),
            "beta2": (0 <= config.beta2 < 1, "within 0 and 1 (1 excluded)", "0.99"),
        }
        for name, (holds, rule, remedy) in rules.items():
            if not holds:
                raise ValueError(f"optimizer.{name} must be {rule}, but is {getattr(config, name)}; use {remedy}")

    @torch.no_grad()
    def step(self, lr: float, grad_scale: Tensor, skip: Tensor) -> None:
        skipped = skip.bool()
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            weight, momentum = local_part(parameter), self._momentum[name]
            grad = local_part(parameter.grad).to(momentum.dtype) / grad_scale.to(momentum.dtype)
            direction = torch.lerp(grad, momentum, self._config.beta1).sign() + self._decay[name] * weight
            # Chosen on the device: the host does not know yet whether the step counts, and NaN times 0 is NaN.
            weight.copy_(torch.where(skipped, weight, weight - lr * direction))
            momentum.copy_(torch.where(skipped, momentum, torch.lerp(grad, momentum, self._config.beta2)))

    def zero_grad(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def reset(self) -> None:
        for momentum in self._momentum.values():
            momentum.zero_()

    def state_tensors(self) -> dict[str, Tensor]:
        # By name and as shards of the whole, so that the checkpoint loads into any layout.
        return {f"state.{n}.momentum": like_parameter(self._momentum[n], p) for n, p in self._parameters.items()}
