"""The run's tensors by the names that a checkpoint has for them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from regrow.trainer.optimizer import Optimizer
from regrow.trainer.parallel.engine import Engine
from regrow.trainer.shards import plain_parameter
from regrow.trainer.state import TrainState

__all__ = ["counter_tensors", "full_state", "model_tensors", "optimizer_tensors"]


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by their own names; tied ones once."""
    tensors = dict(model.named_parameters())
    persistent = model.state_dict().keys()
    return {
        **{n: plain_parameter(p) for n, p in tensors.items()},
        **{n: b for n, b in model.named_buffers() if n in persistent},
    }


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state below `optimizer.`."""
    return {f"optimizer.{name}": tensor for name, tensor in optimizer.state_tensors().items()}


def counter_tensors(state: TrainState) -> dict[str, Tensor]:
    """The counters for readers of plain DCP; ours come from the manifest."""
    counters = {k: v for k, v in state.as_json().items() if isinstance(v, int)}
    return {f"train_state.{name}": torch.tensor(value) for name, value in counters.items()}


def full_state(
    engine: Engine, optimizer: Optimizer, state: TrainState
) -> tuple[dict[str, Tensor], Mapping[str, Sequence[int]]]:
    """What a full step holds, and the ranks that have each of it where not all do."""
    tensors = model_tensors(engine.model) | optimizer_tensors(optimizer) | counter_tensors(state)
    return tensors, engine.owner_ranks([n for n in tensors if not n.startswith("train_state.")])
