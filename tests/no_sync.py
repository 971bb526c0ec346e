"""A training step for which the host never waits for the device, shown without one.

On the `meta` device tensors have shapes and no values, so a step runs as it would on an accelerator, and whatever needs
a value is refused by name: operators whose result or its shape depends on values, and copies to the host.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from regrow.launch.run.compose import compose_trainer
from regrow.launch.run.signals import StopFlag
from regrow.models.mixture_config import MixtureConfig
from regrow.trainer.loop import Trainer
from regrow.trainer.parallel import expert
from regrow.trainer.parallel.context import ParallelContext, close_parallel
from regrow.trainer.parallel.mesh import make_meshes
from tests.runs import spec_of

__all__ = ["HostSyncError", "NoHostSync", "meta_trainer", "one_step"]

META = torch.device("meta")
_WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_INDEXING = {"aten::index.Tensor", "aten::_unsafe_index.Tensor", "aten::index_put", "aten::index_put_",
             "aten::_index_put_impl_"}  # fmt: skip


class HostSyncError(AssertionError):
    """The host would wait for the device."""


class NoHostSync(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses every operator for which the host must know values of tensors that are not its own."""

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        tensors = [t for t in _flat((args, kwargs)) if isinstance(t, Tensor)]
        if any(t.device.type != "cpu" for t in tensors):
            self._check(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _check(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        name = func.name()
        if name.rstrip("_") in {n.rstrip("_") for n in _INDEXING}:
            # Whole numbers say where; truths must be counted first.
            waits = any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        elif name == "aten::copy_":
            waits = args[0].device.type == "cpu" and args[1].device.type != "cpu"
        else:
            to = kwargs.get("device")
            waits = bool(_WAITS & set(func.tags)) or (to is not None and torch.device(to).type == "cpu")
        if waits:
            raise HostSyncError(f"the host would wait for the device in {name}")


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _flat(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _flat(item)
    else:
        yield value


def _let_fsdp_run_without_values(patch: pytest.MonkeyPatch) -> None:
    """FSDP asks for a device that has streams, and for parameters that have values."""
    inside = "torch.distributed.fsdp._fully_shard"
    patch.setattr(f"{inside}._fully_shard._get_device_from_mesh", lambda _mesh: META)
    patch.setattr(f"{inside}._fsdp_param_group.FSDPParamGroup._validate_no_meta_params", lambda _self: None)
    patch.setattr(torch, "meta", torch.cpu, raising=False)


@contextlib.contextmanager
def meta_trainer(overrides: list[str], folder: Path, world_size: int) -> Iterator[tuple[Trainer, list[str]]]:
    """A whole trainer on the meta device, as rank 0 of ranks that are not there.

    Yields:
        The trainer, and a list which grows by a name for each wait that is allowed: the exchange of sizes in expert
        parallelism.
    """
    spec = spec_of([*overrides, "checkpoint=disabled", "hooks=none"], folder, world_size)
    allowed: list[str] = []

    data, model = spec.config.data, spec.config.model

    def made_up_sizes(counts_QE: Tensor, incoming_QE: Tensor) -> tuple[list[int], list[int]]:
        assert counts_QE.shape == incoming_QE.shape
        assert counts_QE.device == META
        assert isinstance(model, MixtureConfig)
        allowed.append("sizes_on_host")
        rows, others = data.micro_batch_size * data.seq_len * model.experts_per_token, len(counts_QE) - 1
        return [rows - 3 * others, *[3] * others], [7] * len(counts_QE)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expert, "sizes_on_host", made_up_sizes)
        _let_fsdp_run_without_values(patch)
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
        try:
            group = dist.new_group(backend="fake")
            assert group is not None
            meshes = make_meshes(spec.layout, "cpu")
            context = ParallelContext(layout=spec.layout, meshes=meshes, device=META, cpu_group=group, rank=0)
            yield compose_trainer(spec, context, StopFlag(), 1), allowed
        finally:
            close_parallel()


def one_step(trainer: Trainer) -> None:
    """All that a step gives to the device: forward, loss, backward, norm, clipping, optimizer, biases, reduction."""
    batches = trainer._make_batches(trainer.state)
    try:
        trainer.batch = next(batches)
        with NoHostSync():  # type: ignore[no-untyped-call]
            trainer._loss_sum = trainer._forward_backward(trainer.batch)
            _, trainer._grad_norm = trainer._update()
            trainer._start_reduction(0.0)
    finally:
        batches.close()
